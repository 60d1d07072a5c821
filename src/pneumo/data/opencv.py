"""OpenCV without its own threads: import `cv2` from here and nowhere else.

Its pool takes every core of the machine, whatever a rank was given; work is divided among ranks and Dask's threads.
"""

import cv2

cv2.setNumThreads(1)

__all__ = ["cv2"]
