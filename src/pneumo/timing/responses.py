"""Which tensors travelled in which of Horovod's fused responses; it does not say."""

from collections.abc import Sequence

MOST_TRIES = 5_000


def assign(sizes: Sequence[int], totals: Sequence[int], ready: Sequence[int] | None = None) -> list[list[int]] | None:
    """Share tensors out among responses so that the bytes agree; returns the tensors of each response.

    `sizes` are the tensors' bytes in the order in which they were enqueued, `totals` the responses' in the order in
    which they travelled, all above 0; every tensor travels once. `ready` says of each response how many of the tensors
    had been enqueued when it began to travel, and no other can be in it. Of several solutions the one that sends
    tensors in the order of their enqueueing comes first. None where there is no solution, or none was found in
    MOST_TRIES steps of the search.
    """
    ready = [len(sizes)] * len(totals) if ready is None else ready
    if not sizes or sum(sizes) != sum(totals):
        return None if sizes or totals else []
    response_of = [-1] * len(sizes)
    placed: list[int] = []
    response, missing, start, failed = 0, totals[0], 0, 0
    for _ in range(MOST_TRIES):
        # Where a tensor has failed, another one of the same size that is enqueued later fails, too.
        fitting = (i for i in range(start, ready[response]) if response_of[i] < 0 and failed != sizes[i] <= missing)
        tensor = next(fitting, -1)
        if tensor >= 0:
            placed.append(tensor)
            response_of[tensor] = response
            missing, start, failed = missing - sizes[tensor], tensor + 1, 0
            if missing == 0:
                response, start = response + 1, 0
                if response == len(totals):
                    return [[i for i, of in enumerate(response_of) if of == r] for r in range(response)]
                missing = totals[response]
        elif placed:
            tensor = placed.pop()
            missing = sizes[tensor] + (missing if response_of[tensor] == response else 0)
            response, response_of[tensor] = response_of[tensor], -1
            start, failed = tensor + 1, sizes[tensor]
        else:
            return None
    return None
