"""From DICOM files, or a generated sample of them, to batches of augmented pictures."""
