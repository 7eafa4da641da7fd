// The tiles of a grouped product (grouped_mm.cu), and which cluster computes which.

#pragma once

#include "hopper.cuh"

constexpr int TILE_M = 128, TILE_N = 256;
// Columns of D in a tile; with gate and up in it, columns of each.
constexpr int STEP_N = SWIGLU && KIND == 0 ? TILE_N / 2 : TILE_N;
constexpr int SUPER = 8;  // pairs visited together, so that the L2 cache serves
constexpr bool BY_ROWS = KIND < 2;
// Where only half of a tile's columns are left, the rest is neither fetched nor multiplied; not in
// KIND 0, where B comes in two parts of 128.
constexpr bool NARROWS = KIND != 0;

// Copies the groups' ends to shared memory, which answers sooner. Called by all threads, which have to
// be synchronised before `end_of`.
__device__ __forceinline__ void copy_ends(u32 to, const int* ends, int groups) {
  for (int i = threadIdx.x; i < groups; i += blockDim.x)
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(to + 4 * i), "r"(ends[i]) : "memory");
}

__device__ __forceinline__ int end_of(u32 ends, int group) {
  int end;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(end) : "r"(ends + 4 * group) : "memory");
  return uniform(end);
}

struct Tile {
  int group, begin, end;  // rows of the group
  int m, n;               // first row and column: of the group's rows (KIND 2: of D[e])
  int rows;               // to store; 0: the other tile of the pair is the last one
  bool narrow;            // only half of the columns are left
  bool alone;             // shares no fetch with the pair's other tile, which lies beside it
};

// Finds this block's tile (the first or the second) of a pair, by the pair's number, which must not
// decrease.
struct Tiles {
  u32 ends;  // in shared memory
  int groups, M, N, rank;
  int group = 0, begin = 0, before = 0;

  __device__ bool find(int index, Tile& tile) {
    const int tiles_n = (N + STEP_N - 1) / STEP_N, pairs_n = (tiles_n + 1) / 2;
    for (; group < groups; group++) {
      const int end = end_of(ends, group);
      const int rows = BY_ROWS ? end - begin : M, tiles_m = (rows + TILE_M - 1) / TILE_M;
      const int pairs_m = tiles_m / 2, pairs = pairs_m * tiles_n, alone = tiles_m % 2 * pairs_n;
      const int local = index - before;
      if (local < pairs + alone) {
        int m = tiles_m - 1, n = (local - pairs) * 2 + rank;
        if (local < pairs) {
          const int first = local / (SUPER * tiles_n) * SUPER, size = min(pairs_m - first, SUPER);
          const int place = local % (SUPER * tiles_n);
          m = (first + place % size) * 2 + rank, n = place / size;
        }
        const int row = m * TILE_M, column = n * STEP_N;
        const int to_store = column < N ? min(rows - row, TILE_M) : 0;
        const bool narrow = NARROWS && column + TILE_N / 2 >= N;
        tile = {group, begin, end, row, column, to_store, narrow, local >= pairs};
        return true;
      }
      before += pairs + alone;
      begin = end;
    }
    return false;
  }
};

// The numbers of the pairs that a cluster computes, told to all of its warps. One thread of the first
// block asks the counter, and sends the answer to both blocks, a turn ahead.
struct Turns {
  u32 numbers, told, heard;  // two each, used in turn; `heard` counts warps, in the first block
  int turn = 0;

  __device__ int slot() const { return turn % 2; }
  __device__ u32 parity() const { return turn / 2 % 2; }

  // By one thread of each block.
  __device__ void expect() const { barrier_expect(told + 8 * slot(), 4); }

  // By whole warps.
  __device__ int next() {
    barrier_wait(told + 8 * slot(), parity());
    int number;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(number) : "r"(numbers + 4 * slot()) : "memory");
    number = uniform(number);
    // Arriving doesn't wait for a load; comparing what it loads does.
    if (threadIdx.x % 32 == 0 && number >= 0) barrier_arrive_at(0, heard + 8 * slot());
    turn++;
    return number;
  }

  // Tells the number of this turn, once no warp needs the one before the last.
  __device__ void tell(int number) const {
    barrier_wait(heard + 8 * slot(), parity() ^ 1);
    send(0, numbers + 4 * slot(), number, told + 8 * slot());
    send(1, numbers + 4 * slot(), number, told + 8 * slot());
  }
};
