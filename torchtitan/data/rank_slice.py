"""Which examples of the run a data-parallel rank takes, and which of its processes makes each."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import get_worker_info


@dataclass(frozen=True)
class RankSlice:
    """The examples of one data-parallel rank.

    Local batch i holds the rank's examples m in [i * batch_size, (i + 1) * batch_size); worker k
    of w makes the batches k, k + w, k + 2w, ... (the loader asks its workers in rotation).

    dp_rank: data-parallel rank
    dp_degree: number of data-parallel ranks
    batch_size: examples per batch of a rank
    num_workers: loader processes per rank; 0 loads in the training process
    """

    dp_rank: int = 0
    dp_degree: int = 1
    batch_size: int = 1
    num_workers: int = 0

    @property
    def processes(self) -> int:
        """Number of processes that make examples, over all ranks."""
        return self.dp_degree * max(1, self.num_workers)

    def examples(self, first: int, worker: int = 0) -> Iterator[int]:
        """Numbers of one loader process's examples, without end.

        first: N, the examples of the run before this iteration
        worker: index of the process among the rank's workers
        """
        for batch in itertools.count(worker, max(1, self.num_workers)):
            for m in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                yield first + m * self.dp_degree + self.dp_rank

    def examples_here(self, first: int) -> Iterator[int]:
        """`examples` of the calling process, which may be a worker."""
        info = get_worker_info()
        return self.examples(first, info.id if info else 0)

    def streams(self, num_streams: int, examples: Iterator[int]) -> set[int]:
        """Streams that these examples come from; after num_streams batches they repeat."""
        first = itertools.islice(examples, num_streams * self.batch_size)
        return {n % num_streams for n in first}

    def times_made(self, num_streams: int) -> float:
        """Times that an example is made on average: each process makes the whole of every stream
        that it takes examples from."""
        met = self.streams(num_streams, self.examples(0))
        return len(met) * self.processes / num_streams
