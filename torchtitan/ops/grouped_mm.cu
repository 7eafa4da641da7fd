// Products of bf16 matrices for groups of rows on Hopper, with the gather of rows inside.
//
//   KIND 0   D (R, N) = A (R, K) · B[e]ᵀ, B (G, N, K): outputs.
//   KIND 1   D (R, N) = A (R, K) · B[e], B (G, K, N): gradients of inputs.
//   KIND 2   D[e] (M, N) = A (R, M)ᵀ · B (R, N) over the rows of group e: gradients of weights.
//   TRANSPOSED 1 (KIND 2): D[e]ᵀ (N, M) is stored.
//   GATHER   1: the rows of A are rows of a smaller matrix, slot / TOP_K of each.
//   SWIGLU   1 (KIND 0): B[e] is gate (N, K) above up (N, K); D (R, 2 N), and H (R, N) =
//            silu(gate) · up · the slot's weight, of gate and up as they were rounded.
//            1 (KIND 1): the product, rounded, is the gradient of H; D (R, 2 N) is that of gate and
//            up, and H is computed again.
//
// A block of 384 threads: one warpgroup that brings tiles, two that multiply, each 64 of a tile's 128
// rows by 256 columns. Whole tiles are fetched by the TMA; gathered rows, and the last rows of a group
// in KIND 2 (with zeros behind them), are copied by the threads of the first warpgroup. Gate and up
// come behind a tile's last stage, where SWIGLU's gradient needs them. Two blocks, a cluster, have
// tiles above one another, and each fetches half of their B for both. Where an odd tile is left, the
// one beside it is its pair, and nothing is shared. Clusters are persistent: each asks a counter for
// its next pair of tiles, so that those which start late, since another kernel held their place, get
// fewer. They find the group in the list of ends on the device, so the host need not know any size;
// a warpgroup looks for its next tile while the tensor cores are at the last stage of this one.
//
// Power limits these products: bytes from the L2 cache cost it, and instructions do. Branches in warps
// that multiply are on numbers that the compiler knows to be the same in the whole warp (`uniform`):
// with one branch that it has to doubt, each of a stage's addresses takes an instruction of 32 threads.
//
// Compiled by NVRTC with KIND, TRANSPOSED, GATHER, SWIGLU and TOP_K defined.

#include "grouped_tiles.cuh"
#include "wgmma.cuh"

constexpr int TILE_K = 64;
constexpr int BOXES_A = TILE_M / 64, BOXES_B = TILE_N / 64;
constexpr int PARTS_B = KIND == 0 ? 2 : BOXES_B;  // B's tile is fetched in
constexpr int BYTES_A = BOXES_A * BOX, BYTES_B = BOXES_B * BOX;
constexpr int BYTES_STAGE = BYTES_A + BYTES_B;
constexpr int STAGES = 4;
// Staging of results, boxes of 64 columns: of a warp's 16 rows, or (TRANSPOSED) a warpgroup's 64.
constexpr int BYTES_BOX = (TRANSPOSED ? 64 : 16) * 128, BUFFERS = 2;
constexpr int BYTES_RESULTS = (TRANSPOSED ? 2 : 8) * BUFFERS * BYTES_BOX;
using Stores = Boxes<BUFFERS, BYTES_BOX>;  // of a warp; of a warpgroup where TRANSPOSED
// SWIGLU's gradient: gate and up of 64 columns come in a stage, and the results leave from there.
constexpr int STAGES_GATE_UP = SWIGLU && KIND == 1 ? TILE_N / 64 : 0;
constexpr int BYTES_GATE = TILE_M * 128;
constexpr bool COPIES = GATHER != 0 || KIND == 2;
constexpr int BRINGING_WARPS = COPIES ? 4 : 1;
// The dim that a product adds up is the matrix's second (0) or its first (1).
constexpr bool A_ACROSS = KIND == 2, B_ACROSS = KIND >= 1;

// Copies 16 bytes. What lies beside them is wanted soon, hence 256 bytes into the L2 cache.
__device__ __forceinline__ void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The same; where `inside` is false, writes zeros.
__device__ __forceinline__ void copy16_if(bool inside, u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}

// Arrives when this thread's copies so far have landed.
__device__ __forceinline__ void copies_arrive(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

struct Arguments {
  const TensorMap *map_a, *map_b, *map_gate_up;
  const u16 *a, *b;
  const int* slots;
  int M, N, K, rank;
};

// Places of the stages in shared memory, taken in turn.
struct Ring {
  u32 base, full, empty;
  int stage = 0;
  u32 parity = 0;

  __device__ u32 a() const { return base + stage * BYTES_STAGE; }
  __device__ u32 b() const { return a() + BYTES_A; }
  __device__ u32 hidden() const { return a(); }
  __device__ u32 gate() const { return b(); }
  __device__ u32 up() const { return gate() + BYTES_GATE; }
  __device__ u32 is_full() const { return full + 8 * stage; }
  __device__ u32 is_empty() const { return empty + 8 * stage; }
  __device__ u32 is_empty_before() const { return empty + 8 * (stage == 0 ? STAGES - 1 : stage - 1); }
  __device__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ int bytes_of_b(const Tile& tile) { return tile.narrow ? BYTES_B / 2 : BYTES_B; }

// Fetches a part of B's tile, 64 elements of each column, from `k` on; KIND 2: 64 rows from `k` on.
__device__ __forceinline__ void bring_part(const Arguments& of, const Tile& tile, int k, int part,
                                           const Ring& ring) {
  const u32 to = ring.b() + part * (BYTES_B / PARTS_B);
  int column = tile.n + part * 64, row = KIND == 1 ? tile.group * of.K + k : k;
  if (KIND == 0) {
    column = k;
    row = SWIGLU ? (tile.group * 2 + part) * of.N + tile.n : tile.group * of.N + tile.n + part * 128;
  }
  if (tile.alone)
    fetch(to, of.map_b, column, row, ring.is_full());
  else
    fetch_for(3, to, of.map_b, column, row, ring.is_full());
}

// Fetches this block's parts of B's tile for both blocks, or all of it where the tile is alone.
__device__ __forceinline__ void bring_b(const Arguments& of, const Tile& tile, int k, const Ring& ring) {
  const int parts = tile.narrow ? PARTS_B / 2 : PARTS_B;
  if (tile.alone) {
    for (int part = 0; part < parts; part++) bring_part(of, tile, k, part, ring);
    return;
  }
#pragma unroll
  for (int part = 0; part < PARTS_B; part += 2)
    if (part < parts) bring_part(of, tile, k, part + of.rank, ring);
}

// Brings the tiles of a product by weights: 64 elements of 128 rows and of 256 columns (narrow: 128) a
// stage.
__device__ __forceinline__ void bring_rows(const Arguments& of, const Tile& tile, Ring& ring) {
  constexpr int LINES = TILE_M / 16;  // eight threads copy a line, so that 16 are copied at a time
  const int piece = threadIdx.x % 8, line = threadIdx.x / 8;
  const int first = tile.begin + tile.m;
  u32 pieces[LINES];  // that this thread copies: bytes from the beginning of A; 32 bits are cheaper
  if (GATHER) {
#pragma unroll
    for (int i = 0; i < LINES; i++) {
      const u32 row = __ldg(of.slots + min(first + line + i * 16, tile.end - 1)) / TOP_K;
      pieces[i] = row * of.K * 2 + piece * 16;
    }
  }
  for (int k = 0; k < of.K; k += TILE_K) {
    barrier_wait(ring.is_empty(), ring.parity ^ 1);
    const u32 done = ring.is_full();
    if (threadIdx.x == 0) {
      const bool fetches_a = !GATHER && tile.rows > 0, fetches_b = !tile.alone || tile.rows > 0;
      barrier_expect(done, (fetches_a ? BYTES_A : 0) + (fetches_b ? bytes_of_b(tile) : 0));
      if (fetches_a) fetch(ring.a(), of.map_a, k, first, done);
      if (fetches_b) bring_b(of, tile, k, ring);
    }
    if (GATHER) {
      const char* from = reinterpret_cast<const char*>(of.a + k);
      const u32 to = ring.a() + swizzled(line, piece);
      if (tile.rows > 0)
#pragma unroll
        for (int i = 0; i < LINES; i++) copy16(to + i * 16 * 128, from + pieces[i]);
      copies_arrive(done);
    }
    ring.next();
  }
}

// Brings gate and up, 64 columns of the tile's rows a stage.
__device__ __forceinline__ void bring_gate_up(const Arguments& of, const Tile& tile, Ring& ring) {
  for (int i = 0; i < STAGES_GATE_UP; i++) {
    const int column = tile.n + i * 64;
    barrier_wait(ring.is_empty(), ring.parity ^ 1);
    const u32 done = ring.is_full();
    if (threadIdx.x == 0) {
      const bool fetches = tile.rows > 0 && column < of.N;
      barrier_expect(done, fetches ? 2 * BYTES_GATE : 0);
      if (fetches) {
        fetch(ring.gate(), of.map_gate_up, column, tile.begin + tile.m, done);
        fetch(ring.up(), of.map_gate_up, of.N + column, tile.begin + tile.m, done);
      }
    }
    if (COPIES) copies_arrive(done);
    ring.next();
  }
}

// Copies boxes of 64 columns of 64 rows of a matrix `width` columns wide.
//
// lines: of the rows that this thread copies, one in every 16; bytes from the beginning of the matrix.
// left: rows that there are; zeros are copied behind.
template <int BOXES>
__device__ __forceinline__ void copy_boxes(u32 to, const u16* matrix, const u64 (&lines)[4], int column,
                                           int width, int left) {
  const int piece = threadIdx.x % 8, line = threadIdx.x / 8;
  to += swizzled(line, piece);
  column += piece * 8;
  const char* from = reinterpret_cast<const char*>(matrix + column);
  if (left >= 64 && column + (BOXES - 1) * 64 < width) {  // no check at each copy: instructions cost power
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int box = 0; box < BOXES; box++) copy16(to + box * BOX + i * 16 * 128, from + lines[i] + box * 128);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int box = 0; box < BOXES; box++) {
      const bool inside = line + i * 16 < left && column + box * 64 < width;
      const void* piece_of_line = inside ? from + lines[i] + box * 128 : (const char*)matrix;
      copy16_if(inside, to + box * BOX + i * 16 * 128, piece_of_line);
    }
}

// Copies the last rows of a group, without a list.
template <int BOXES>
__device__ __forceinline__ void copy_last(u32 to, const u16* matrix, int row, int column, int width, int left) {
  u64 lines[4];
#pragma unroll
  for (int i = 0; i < 4; i++) lines[i] = u64(row + threadIdx.x / 8 + i * 16) * width * 2;
  copy_boxes<BOXES>(to, matrix, lines, column, width, left);
}

// Brings the tiles of a weight's gradient: 128 columns of A and 256 of B (narrow: 128), 64 rows of the
// group a stage.
__device__ __forceinline__ void bring_columns(const Arguments& of, const Tile& tile, Ring& ring) {
  u32 slots[4];
  const auto look_up = [&](int row) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int place = max(min(row + int(threadIdx.x) / 8 + i * 16, tile.end - 1), 0);
      asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(slots[i]) : "l"(of.slots + place));
    }
  };
  if (GATHER) look_up(tile.begin);
  for (int row = tile.begin; row < tile.end; row += TILE_K) {
    const int left = tile.end - row;
    u64 lines[4];
    if (GATHER) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        u32 line = slots[i] / TOP_K * of.M * 2;
        asm volatile("" : "+r"(line));  // computed here, so that no wait comes behind the next load
        lines[i] = line;
      }
      look_up(row + TILE_K);  // a stage ahead: the list comes from memory
    }
    barrier_wait(ring.is_empty(), ring.parity ^ 1);
    const u32 done = ring.is_full();
    const bool whole = left >= TILE_K;
    if (threadIdx.x == 0 && !whole) barrier_arrive(done);
    if (threadIdx.x == 0 && whole) {
      barrier_expect(done, (GATHER ? 0 : BYTES_A) + bytes_of_b(tile));
      if (!GATHER)
#pragma unroll
        for (int box = 0; box < BOXES_A; box++)
          fetch(ring.a() + box * BOX, of.map_a, tile.m + box * 64, row, done);
      bring_b(of, tile, row, ring);
    }
    if (GATHER) copy_boxes<BOXES_A>(ring.a(), of.a, lines, tile.m, of.M, left);
    if (!whole) {
      if (!GATHER) copy_last<BOXES_A>(ring.a(), of.a, row, tile.m, of.M, left);
      copy_last<BOXES_B>(ring.b(), of.b, row, tile.n, of.N, left);
    }
    copies_arrive(done);
    ring.next();
  }
}

// Brings this block's tiles, and asks the counter which they are.
__device__ __forceinline__ void bring_tiles(const Arguments& of, Tiles& tiles, Turns& turns, Ring& ring,
                                            int* counter) {
  const bool asks = threadIdx.x == 0 && of.rank == 0;
  Tile tile;
  if (threadIdx.x == 0) turns.expect();
  if (asks) turns.tell(atomicAdd(counter, 1));
  while (true) {
    const int index = turns.next();
    if (!tiles.find(index, tile)) {
      // Each cluster is told one number too many; nobody asks after the last.
      if (asks && index == tiles.before + gridDim.x / 2 - 1) *counter = 0;
      return;
    }
    const int following = asks ? atomicAdd(counter, 1) : 0;
    if (COPIES || threadIdx.x == 0) {
      if constexpr (BY_ROWS)
        bring_rows(of, tile, ring);
      else
        bring_columns(of, tile, ring);
    }
    // Before gate and up: warps that multiply are told their next tile before they free a stage for all
    // of those.
    if (threadIdx.x == 0) turns.expect();
    if (asks) turns.tell(following);
    if (COPIES || threadIdx.x == 0) bring_gate_up(of, tile, ring);
    __syncwarp();
  }
}

// Tells both blocks that a warp needs a stage no more: either fetches into both.
__device__ __forceinline__ void release(u32 is_empty, int rank) {
  if (threadIdx.x % 32) return;
  barrier_arrive(is_empty);
  barrier_arrive_at(rank ^ 1, is_empty);
}

// Releases the stages of a tile of which this warpgroup has no rows.
__device__ __forceinline__ void skip_tile(int steps, int rank, Ring& ring) {
  for (int step = 0; step < steps; step++) {
    barrier_wait(ring.is_full(), ring.parity);
    release(ring.is_empty(), rank);
    ring.next();
  }
}

// Multiplies what the first warpgroup brings: 64 × 256 results (narrow: 128) of this warpgroup. The
// tensor cores may still be at the last stage: `finish` waits for them.
template <bool NARROW>
__device__ __forceinline__ void multiply_tile(float (&d)[128], int steps, int half, int rank,
                                              Ring& ring) {
  constexpr int NEXT_A = A_ACROSS ? 2048 >> 4 : 2, NEXT_B = B_ACROSS ? 2048 >> 4 : 2;  // 16 elements on
  if (steps == 0) {
#pragma unroll
    for (int i = 0; i < 128; i++) d[i] = 0.f;
  }
  for (int step = 0; step < steps; step++) {
    barrier_wait(ring.is_full(), ring.parity);
    // What threads have copied has to be seen by the tensor cores.
    if (COPIES) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    const u32 a = tile_descriptor<A_ACROSS>(ring.a() + half * BOX);
    const u32 b = tile_descriptor<B_ACROSS>(ring.b());
    pin(d);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const bool add = step > 0 || i > 0;
      if constexpr (NARROW)
        multiply_by_128<A_ACROSS, B_ACROSS>(d, a + i * NEXT_A, b + i * NEXT_B, add);
      else
        multiply_by_256<A_ACROSS, B_ACROSS>(d, a + i * NEXT_A, b + i * NEXT_B, add);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // the stage before is free
    if (step > 0) release(ring.is_empty_before(), rank);
    ring.next();
  }
}

// Waits for all products of a tile.
__device__ __forceinline__ void finish(float (&d)[128], int steps, int rank, const Ring& ring) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  pin(d);
  if (steps > 0) release(ring.is_empty_before(), rank);
}

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// Stores 64 columns of the warpgroup's 64 rows as 64 rows of 64 columns.
__device__ __forceinline__ void store_transposed(const u32 (&x)[2][8], const Out& out, long long row, int column,
                                                 Stores& boxes) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, group = 1 + threadIdx.x / 128;
  const u32 buffer = boxes.next_buffer();
  asm volatile("bar.sync %0, 128;" ::"r"(group) : "memory");
  const u32 to = buffer + swizzled(lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2);
#pragma unroll
  for (int i = 0; i < 4; i++)  // 16 rows
    store_matrices<true>(to + i * 16 * 128, x[0][2 * i], x[1][2 * i], x[0][2 * i + 1], x[1][2 * i + 1]);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync %0, 128;" ::"r"(group) : "memory");
  if (lane == 0) tma_store(out.map, column, row + warp * 16, buffer + warp * 16 * 128);
  __syncwarp();  // the compiler knows the warp together again
}

// Loads 64 columns of the warp's 16 rows as `store_box` holds them.
__device__ __forceinline__ void load_box(u32 box, u32 (&x)[2][8]) {
  const u32 from = box + swizzled(threadIdx.x % 16, threadIdx.x % 32 / 16);
#pragma unroll
  for (int i = 0; i < 4; i++)  // 16 columns
    load_matrices(from ^ i * 32, x[0][2 * i], x[1][2 * i], x[0][2 * i + 1], x[1][2 * i + 1]);
}

// Computes the activation of 64 columns from gate and up as they were rounded.
__device__ __forceinline__ void activate(const u32 (&gate)[2][8], const u32 (&up)[2][8],
                                         const float (&weight)[2], u32 (&x)[2][8]) {
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 2; j++)
      x[j][i] = pack(silu(low(gate[j][i])) * low(up[j][i]) * weight[j],
                     silu(high(gate[j][i])) * high(up[j][i]) * weight[j]);
}

// What is stored, and what it is computed with beside the product.
struct Results {
  Out out, hidden;
  const int* slots;
  const float* weights;
  float* grad_weights;
  int M, N, rank;
};

// What a warp stores of a tile: 16 rows.
struct Rows {
  long long first;  // row of the output
  int count;
  int slot[2];  // of this thread's rows (SWIGLU)
  float weight[2];
};

__device__ __forceinline__ Rows find_rows_to_store(const Results& of, const Tile& tile, int half) {
  const int of_tile = uniform(half * 64 + threadIdx.x % 128 / 32 * 16);
  Rows rows{(BY_ROWS ? tile.begin : (long long)tile.group * of.M) + tile.m + of_tile, tile.rows - of_tile};
  if (SWIGLU)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int row = threadIdx.x % 32 / 4 + j * 8;
      if (row < rows.count) {
        rows.slot[j] = __ldg(of.slots + rows.first + row);
        rows.weight[j] = __ldg(of.weights + rows.slot[j]);
      }
    }
  return rows;
}

// Stores the 64 rows of a tile that this warpgroup has multiplied.
__device__ __forceinline__ void store_tile(const float (&d)[128], const Results& of, const Tile& tile, int half,
                                           const Rows& rows, Stores& boxes) {
  if (uniform(rows.count) <= 0) return;
  const int columns = uniform(of.N - tile.n);
#pragma unroll
  for (int i = 0; i < STEP_N / 64; i++) {
    if (i * 64 >= columns) break;
    const int column = tile.n + i * 64;
    u32 x[2][8];
    round_box(d + i * 32, x);
    if constexpr (TRANSPOSED) {
      store_transposed(x, of.out, (long long)tile.group * of.N + column, tile.m + half * 64, boxes);
      continue;
    }
    boxes.store(x, of.out, rows.first, column, rows.count);
    if (SWIGLU) {
      u32 up[2][8];
      round_box(d + 64 + i * 32, up);
      boxes.store(up, of.out, rows.first, of.N + column, rows.count);
      activate(x, up, rows.weight, x);
      boxes.store(x, of.hidden, rows.first, column, rows.count);
    }
  }
}

// Computes SWIGLU's gradients of 64 columns.
//
// grad: of the activation; becomes the activation. gate, up: become their gradients. sums: the
// weights' gradients, to which these columns are added.
__device__ __forceinline__ void differentiate(u32 (&grad)[2][8], u32 (&gate)[2][8], u32 (&up)[2][8],
                                              const float (&weight)[2], float (&sums)[2]) {
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float grads[2] = {low(grad[j][i]), high(grad[j][i])};
      const float gates[2] = {low(gate[j][i]), high(gate[j][i])}, ups[2] = {low(up[j][i]), high(up[j][i])};
      float of_gate[2], of_up[2], hidden[2];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const float s = sigmoid(gates[k]), activated = gates[k] * s, product = activated * ups[k];
        const float weighted = grads[k] * weight[j];
        sums[j] += grads[k] * product;
        of_gate[k] = weighted * ups[k] * (s + activated * (1.f - s));
        of_up[k] = weighted * activated;
        hidden[k] = product * weight[j];
      }
      grad[j][i] = pack(hidden[0], hidden[1]);
      gate[j][i] = pack(of_gate[0], of_gate[1]);
      up[j][i] = pack(of_up[0], of_up[1]);
    }
}

// Computes and stores SWIGLU's gradients for this warp's 16 rows, of stages that hold gate and up, each
// of which is free again when its results have left.
__device__ __forceinline__ void store_gradients(const float (&d)[128], const Results& of, const Tile& tile,
                                                int half, const Rows& rows, Ring& ring) {
  const int lane = threadIdx.x % 32, place = (half * 64 + threadIdx.x % 128 / 32 * 16) * 128;
  const int count = uniform(rows.count), columns = count > 0 ? uniform(of.N - tile.n) : 0;
  float sums[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < STAGES_GATE_UP; i++) {
    const int column = tile.n + i * 64;
    barrier_wait(ring.is_full(), ring.parity);
    if (i * 64 < columns) {
      u32 grad[2][8], gate[2][8], up[2][8];
      round_box(d + i * 32, grad);
      load_box(ring.gate() + place, gate);
      load_box(ring.up() + place, up);
      differentiate(grad, gate, up, rows.weight, sums);
      if (count < 16) {
        store_rows(gate, of.out, rows.first, column, count);
        store_rows(up, of.out, rows.first, of.N + column, count);
        store_rows(grad, of.hidden, rows.first, column, count);
      } else {
        store_box(gate, ring.gate() + place, of.out, rows.first, column);
        store_box(up, ring.up() + place, of.out, rows.first, of.N + column);
        store_box(grad, ring.hidden() + place, of.hidden, rows.first, column);
      }
    }
    if (i > 0) {
      if (lane == 0) wait_until_read<3>();
      release(ring.is_empty_before(), of.rank);
    }
    ring.next();
  }
  if (lane == 0) wait_until_read<0>();
  release(ring.is_empty_before(), of.rank);
#pragma unroll
  for (int j = 0; j < 2; j++) {
    sums[j] += __shfl_xor_sync(0xFFFFFFFF, sums[j], 1);
    sums[j] += __shfl_xor_sync(0xFFFFFFFF, sums[j], 2);
    const int tiles_n = (of.N + TILE_N - 1) / TILE_N;
    if (lane % 4 == 0 && lane / 4 + j * 8 < count)
      of.grad_weights[(long long)rows.slot[j] * tiles_n + tile.n / TILE_N] = sums[j];
  }
}

// Multiplies and stores half of each of this block's tiles: the part of one warpgroup.
__device__ __forceinline__ void compute_tiles(const Results& of, int half, int K, Tiles& tiles, Turns& turns,
                                              Ring& ring, Stores& boxes) {
  Tile next;
  bool more = tiles.find(turns.next(), next);
  while (more) {
    const Tile tile = next;
    const int steps = BY_ROWS ? K / TILE_K : (uniform(tile.end - tile.begin) + TILE_K - 1) / TILE_K;
    if (tile.rows <= half * 64) {
      skip_tile(steps + STAGES_GATE_UP, of.rank, ring);
      more = tiles.find(turns.next(), next);
      continue;
    }
    float d[128];
    if (NARROWS && tile.narrow)
      multiply_tile<NARROWS>(d, steps, half, of.rank, ring);
    else
      multiply_tile<false>(d, steps, half, of.rank, ring);
    const Rows rows = find_rows_to_store(of, tile, half);
    more = tiles.find(turns.next(), next);
    finish(d, steps, of.rank, ring);
    if constexpr (STAGES_GATE_UP > 0)
      store_gradients(d, of, tile, half, rows, ring);
    else
      store_tile(d, of, tile, half, rows, boxes);
  }
  if (threadIdx.x % 32 == 0) wait_until_read<0>();
}

// ends: rows up to the end of each group. M: columns of A (KIND 2). N: columns of D; of gate (SWIGLU).
// slots: of each row, with GATHER or SWIGLU. weights: of each slot; hidden: H (SWIGLU). grad_weights:
// (slots, tiles of columns), parts of the weights' gradients (SWIGLU, KIND 1). counter: 0, before and
// after.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    grouped_mm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
               const __grid_constant__ TensorMap map_out, const __grid_constant__ TensorMap map_hidden,
               const __grid_constant__ TensorMap map_gate_up, const u16* __restrict__ a,
               const u16* __restrict__ b, u16* __restrict__ out, const int* __restrict__ ends, int groups,
               int M, int N, int K, const int* __restrict__ slots, const float* __restrict__ weights,
               u16* __restrict__ hidden, float* __restrict__ grad_weights, int* __restrict__ counter) {
  extern __shared__ char raw[];
  const u32 base = (shared_address(raw) + 1023) & ~1023u;
  const u32 buffers = base + STAGES * BYTES_STAGE, barriers = buffers + BYTES_RESULTS;
  Ring ring{base, barriers, barriers + 8 * STAGES};
  const u32 behind = barriers + 16 * STAGES;
  Turns turns{behind + 32, behind, behind + 16};
  const int warpgroup = uniform(threadIdx.x / 128), rank = block_in_cluster();

  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; s++) {
      barrier_init(turns.told + 8 * s, 1);                           // and a number's bytes
      barrier_init(turns.heard + 8 * s, 2 * (8 + BRINGING_WARPS));  // of both blocks
    }
    for (int s = 0; s < STAGES; s++) {
      barrier_init(ring.full + 8 * s, COPIES ? 129 : 1);  // the threads that copy, and the TMA's bytes
      barrier_init(ring.empty + 8 * s, 16);               // warps that multiply
    }
    barriers_are_ready();
  }
  const u32 shared_ends = behind + 40;
  copy_ends(shared_ends, ends, groups);
  cluster_wait();

  Tiles tiles{shared_ends, groups, M, N, rank};
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    const Arguments of{&map_a, &map_b, &map_gate_up, a, b, slots, M, N, K, rank};
    if (threadIdx.x < 32 * BRINGING_WARPS) bring_tiles(of, tiles, turns, ring, counter);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    const Out of_out{&map_out, out, SWIGLU ? 2 * N : N}, of_hidden{&map_hidden, hidden, N};
    const Results of{of_out, of_hidden, slots, weights, grad_weights, M, N, rank};
    const int storing = TRANSPOSED ? warpgroup - 1 : threadIdx.x / 32 - 4;
    Stores boxes{buffers + storing * BUFFERS * BYTES_BOX};
    compute_tiles(of, warpgroup - 1, K, tiles, turns, ring, boxes);
  }
  cluster_wait();  // the other block fetches into this one's memory, and arrives at its barriers
}
