"""Which tensors travelled in which of Horovod's fused responses; it does not say."""

from collections.abc import Sequence

MOST_TRIES = 20_000
MOST_TENSORS = 400  # the search is as deep as there are tensors


def assign(sizes: Sequence[int], totals: Sequence[int]) -> list[list[int]] | None:
    """Share tensors out among responses so that the bytes agree; returns the tensors of each response.

    `sizes` are the tensors' bytes in the order in which they were enqueued, `totals` the responses' in the order in
    which they travelled; every tensor travels once. Of several solutions the one that sends tensors in the order of
    their enqueueing comes first. None where there is no solution, none was found in MOST_TRIES steps, or there are more
    than MOST_TENSORS.
    """
    if not sizes and not totals:
        return []
    if sum(sizes) != sum(totals) or not totals or len(sizes) > MOST_TENSORS:
        return None
    left = list(range(len(sizes)))
    found: list[list[int]] = []
    tries = 0

    def fill(response: int, start: int, missing: int, chosen: list[int]) -> bool:
        nonlocal tries, left
        tries += 1
        if tries > MOST_TRIES:
            return False
        if missing == 0:
            before, left = left, [i for i in left if i not in chosen]
            found.append(list(chosen))
            if response + 1 == len(totals):
                if not left:
                    return True
            elif fill(response + 1, 0, totals[response + 1], []):
                return True
            found.pop()
            left = before
        for position in range(start, len(left)):
            size = sizes[left[position]]
            if size <= missing:
                chosen.append(left[position])
                if fill(response, position + 1, missing - size, chosen):
                    return True
                chosen.pop()
        return False

    return found if fill(0, 0, totals[0], []) else None
