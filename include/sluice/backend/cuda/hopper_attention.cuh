// SPDX-License-Identifier: MIT
/// A chunk's attention on the tensor cores of Hopper: the same work as chunk_attention_kernel, by
/// groups of four warps (wgmma) that read their operands from shared memory, with the copy engine
/// (TMA) filling it. Compiled for sm_90a alone; elsewhere its body is empty and nobody launches it.
///
/// How it works. A block stays and takes one item after another: 128 queries of one head. One
/// thread of the first group of warps keeps a ring of 32 KB buffers full; the other two groups take
/// 64 queries each. While the products of a tile run, a group computes the softmax of the next
/// tile; the two groups take turns at the tensor cores, so that one's exponentials run beside the
/// other's products (Shah et al., FlashAttention-3, arXiv 2407.08608, section 3). Sinks, which a
/// query reads from another place, are a product of their own before the window: at most 16 keys
/// wide.
///
/// Weights are powers of two of score - reference. The reference follows a row's maximum only where
/// that has grown by more than 8 powers of two, so that what is summed up is seldom rescaled.
/// Rounding is relative, and 2^8 is far from the largest number of either type.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

#include <cuda.h>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/decode_attention.cuh"
#include "sluice/core/element.hpp"

namespace sluice::detail {

inline constexpr int kGroupQueries = 64;     // of a group of warps
inline constexpr int kItemQueries = 128;     // of a block
inline constexpr int kItemKeys = 128;        // of a tile
inline constexpr int kItemSinks = 16;        // at most
inline constexpr int kItemDim = 128;         // channels
inline constexpr float kReferenceSlack = 8;  // powers of two
inline constexpr int kItemThreads = 384;
inline constexpr int kItemBuffers = 6;
inline constexpr int kItemBufferBytes = kItemKeys * kItemDim * 2;
inline constexpr int kItemPanelBytes = kItemKeys * 128;  // 64 channels of a tile
inline constexpr int kItemSharedBytes = (1 + kItemBuffers) * kItemBufferBytes + 1024;

struct HopperAttentionParams {
  CUtensorMap query;  // [2 (own place, sinks), tokens, heads, channels], boxes of 128 tokens
  CUtensorMap keys;   // [kv heads, slots, channels], boxes of 128 slots
  CUtensorMap values;
  CUtensorMap sink_keys;  // the same, boxes of 16 slots
  CUtensorMap sink_values;
  void* out;          // [tokens, heads, channels]
  bool wide;          // of float32, else of the tensors' type
  std::int64_t base;  // index of the chunk's first token
  std::int64_t window;
  int tokens;
  int sinks;
  int ring;  // slots that are no sinks'
  int num_qo_heads;
  int group;  // query heads per KV head
  int band;  // query heads whose items come side by side: their keys stay in the second-level cache
  int written;  // slots that hold a token, the chunk's own included
  float scale_log2;
};

/// Where the operands of a product lie in shared memory: rows of 128 bytes, swizzled as the copy
/// engine's 128-byte mode leaves them. stride: between runs of 8 rows; leading: between panels of
/// 64 channels, where a product spans two.
__device__ inline std::uint64_t operand(std::uint32_t address, std::uint32_t leading = 16,
                                        std::uint32_t stride = 1024) {
  return static_cast<std::uint64_t>((address & 0x3ffffU) >> 4) |
         static_cast<std::uint64_t>(leading >> 4) << 16 |
         static_cast<std::uint64_t>(stride >> 4) << 32 | std::uint64_t{1} << 62;
}

/// The same operand, so many bytes further on.
__device__ inline std::uint64_t operand_at(std::uint64_t operand, int bytes) {
  return operand + static_cast<std::uint64_t>(bytes / 16);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// d += A B^T (add != 0) or d = A B^T: 64 x 128, 16 deep; both operands in shared memory, channels
/// consecutive.
template <class Element>
__device__ inline void group_multiply(float (&d)[64], std::uint64_t a, std::uint64_t b, int add) {
  if constexpr (std::is_same_v<Element, bf16>)
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,"
        "%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,"
        "%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "%64, %65, p, 1, 1, 0, 0;\n\t}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
          "+f"(d[63])
        : "l"(a), "l"(b), "r"(add));
  else
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,"
        "%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,"
        "%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "%64, %65, p, 1, 1, 0, 0;\n\t}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
          "+f"(d[63])
        : "l"(a), "l"(b), "r"(add));
}

/// The same, 64 x 16.
template <class Element>
__device__ inline void group_multiply(float (&d)[8], std::uint64_t a, std::uint64_t b, int add) {
  if constexpr (std::is_same_v<Element, bf16>)
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %10, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7}, "
        "%8, %9, p, 1, 1, 0, 0;\n\t}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7])
        : "l"(a), "l"(b), "r"(add));
  else
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %10, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7}, "
        "%8, %9, p, 1, 1, 0, 0;\n\t}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7])
        : "l"(a), "l"(b), "r"(add));
}

/// d += A B, 64 x 128, 16 deep: A in registers, B's rows (16 of them) have consecutive channels.
template <class Element>
__device__ inline void group_multiply_add(float (&d)[64], const std::uint32_t* a, std::uint64_t b) {
  if constexpr (std::is_same_v<Element, bf16>)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,"
        "%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,"
        "%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "{%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
          "+f"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,"
        "%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,"
        "%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "{%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
          "+f"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ inline void group_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void group_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ inline void group_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// What products in flight write is not read before the wait above this, nor moved across it.
template <int kCount>
__device__ inline void settle(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

/// Keeps the assembler from lifting the wait that follows over what x is computed from, which is to
/// run beside the products waited for: they share no register. x is never negative.
__device__ inline void finish(float x) {
  if (x < 0) asm volatile("nanosleep.u32 0;" ::: "memory");
}

__device__ inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
__device__ inline void barrier_init(std::uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ inline void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void barrier_wait(std::uint32_t barrier, int parity) {
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "AGAIN:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t"
      "@p bra DONE;\n\t"
      "bra AGAIN;\n\t"
      "DONE:\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
/// Two of the four groups' barriers, by number; 0 is __syncthreads().
__device__ inline void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void copy_box(std::uint32_t to, const CUtensorMap& map, std::uint32_t barrier,
                                int channel, int slot, int head) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(reinterpret_cast<std::uint64_t>(&map)), "r"(barrier), "r"(channel), "r"(slot), "r"(head)
      : "memory");
}
__device__ inline void copy_box(std::uint32_t to, const CUtensorMap& map, std::uint32_t barrier,
                                int channel, int head, int token, int which) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(reinterpret_cast<std::uint64_t>(&map)), "r"(barrier), "r"(channel), "r"(head), "r"(token),
      "r"(which)
      : "memory");
}

/// What an item consists of: the sinks, then the window's keys by slot, in one run or, where the
/// ring wraps, two.
struct HopperItem {
  int head;
  int first_token;      // of the chunk
  std::int64_t first;   // index of query 0
  std::int64_t oldest;  // index of the first key of the window
  int sinks_seen;
  int tiles[2];   // of the two runs
  int slots[2];   // where they begin
  int counts[2];  // their keys

  __device__ HopperItem(const HopperAttentionParams& p, int item) {
    const int blocks = (p.tokens + kItemQueries - 1) / kItemQueries;
    const int band = item / (p.band * blocks);
    const int rest = item - band * p.band * blocks;
    const int width = min(p.band, p.num_qo_heads - band * p.band);
    head = band * p.band + rest % width;
    first_token = (blocks - 1 - rest / width) * kItemQueries;  // who sees most begins
    first = p.base + first_token;
    const std::int64_t last = p.base + min(first_token + kItemQueries, p.tokens) - 1;
    sinks_seen = static_cast<int>(min(static_cast<std::int64_t>(p.sinks), last + 1));
    oldest = max(static_cast<std::int64_t>(p.sinks), first - p.window + 1);
    const int keys = last < oldest ? 0 : static_cast<int>(last - oldest + 1);
    slots[0] = p.sinks + static_cast<int>((oldest - p.sinks) % p.ring);
    slots[1] = p.sinks;
    counts[0] = min(keys, p.sinks + p.ring - slots[0]);
    counts[1] = keys - counts[0];
    tiles[0] = (counts[0] + kItemKeys - 1) / kItemKeys;
    tiles[1] = (counts[1] + kItemKeys - 1) / kItemKeys;
  }
  __device__ int count() const { return tiles[0] + tiles[1]; }
  __device__ int slot(int n) const {
    return n < tiles[0] ? slots[0] + n * kItemKeys : slots[1] + (n - tiles[0]) * kItemKeys;
  }
  /// Keys before tile n.
  __device__ int before(int n) const {
    return n < tiles[0] ? n * kItemKeys : counts[0] + (n - tiles[0]) * kItemKeys;
  }
  __device__ int present(int n) const {
    return min(kItemKeys, (n < tiles[0] ? counts[0] : counts[0] + counts[1]) - before(n));
  }
};

/// Turns a 2 x 2 matrix of which this lane holds the row (a, b), or where `second` the second row,
/// and the lane `lanes` away the other.
__device__ inline void exchange(std::uint32_t& a, std::uint32_t& b, int lanes, bool second) {
  const std::uint32_t other = __shfl_xor_sync(0xffffffffU, second ? a : b, lanes);
  (second ? a : b) = other;
}

/// A place in the ring of buffers and the parity of its turn.
struct BufferTurn {
  int index = 0;
  int parity = 0;
  __device__ void next() {
    if (++index == kItemBuffers) {
      index = 0;
      parity ^= 1;
    }
  }
};
#endif

template <class Element>
__global__ void __launch_bounds__(kItemThreads, 1)
    hopper_attention_kernel(const __grid_constant__ HopperAttentionParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using H = Half<Element>;
  const float kInfinity = __int_as_float(0x7f800000);
  extern __shared__ unsigned char hopper_memory[];
  __shared__ __align__(8) std::uint64_t full_barriers[kItemBuffers];
  __shared__ __align__(8) std::uint64_t empty_barriers[kItemBuffers];
  __shared__ __align__(8) std::uint64_t query_barriers[2];  // full, empty
  // Swizzled rows repeat every 1,024 bytes.
  const std::uint32_t queries = (shared_address(hopper_memory) + 1023U) & ~1023U;
  const std::uint32_t buffers = queries + kItemBufferBytes;
  const auto full = [&](int i) {
    return shared_address(&full_barriers[i]);
  };
  const auto empty = [&](int i) {
    return shared_address(&empty_barriers[i]);
  };
  const std::uint32_t query_full = shared_address(&query_barriers[0]);
  const std::uint32_t query_empty = shared_address(&query_barriers[1]);
  const int items = (p.tokens + kItemQueries - 1) / kItemQueries * p.num_qo_heads;
  const int tid = static_cast<int>(threadIdx.x);

  if (tid == 0) {
    for (int i = 0; i < kItemBuffers; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), 8);  // warps that read it
    }
    barrier_init(query_full, 1);
    barrier_init(query_empty, 8);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();

  if (tid < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (tid == 0) {
      BufferTurn turn;
      int query_parity = 1;  // the first wait for an empty barrier passes
      const auto take = [&](int bytes) {
        barrier_wait(empty(turn.index), turn.parity ^ 1);
        barrier_expect(full(turn.index), bytes);
        return buffers + turn.index * kItemBufferBytes;
      };
      for (int item = static_cast<int>(blockIdx.x); item < items;
           item += static_cast<int>(gridDim.x)) {
        const HopperItem x(p, item);
        const int kv_head = x.head / p.group;
        barrier_wait(query_empty, query_parity);
        query_parity ^= 1;
        barrier_expect(query_full, kItemBufferBytes);
        for (int panel = 0; panel < 2; ++panel)
          copy_box(queries + panel * kItemPanelBytes, p.query, query_full, 64 * panel, x.head,
                   x.first_token, 0);
        if (x.sinks_seen > 0) {
          std::uint32_t to = take(kItemBufferBytes);
          for (int panel = 0; panel < 2; ++panel)
            copy_box(to + panel * kItemPanelBytes, p.query, full(turn.index), 64 * panel, x.head,
                     x.first_token, 1);
          turn.next();
          to = take(4 * kItemSinks * 128);
          for (int panel = 0; panel < 2; ++panel) {
            copy_box(to + panel * kItemSinks * 128, p.sink_keys, full(turn.index), 64 * panel, 0,
                     kv_head);
            copy_box(to + (2 + panel) * kItemSinks * 128, p.sink_values, full(turn.index),
                     64 * panel, 0, kv_head);
          }
          turn.next();
        }
        const auto load = [&](const CUtensorMap& map, int n) {
          const std::uint32_t to = take(kItemBufferBytes);
          for (int panel = 0; panel < 2; ++panel)
            copy_box(to + panel * kItemPanelBytes, map, full(turn.index), 64 * panel, x.slot(n),
                     kv_head);
          turn.next();
        };
        const int count = x.count();
        for (int n = 0; n < count; ++n) {
          load(p.keys, n);
          if (n > 0) load(p.values, n - 1);
        }
        if (count > 0) load(p.values, count - 1);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    // One lane's: so that the compiler knows them to be the same for the warp.
    const int group = __shfl_sync(0xffffffffU, tid / 128, 0) - 1;  // 0 or 1
    const int warp = __shfl_sync(0xffffffffU, tid / kWarpSize % 4, 0);
    const int lane = tid % kWarpSize;
    const int g = lane / 4;
    const int t = lane % 4;
    BufferTurn turn;
    int query_parity = 0;
    const auto release = [&](int index) {
      __syncwarp();
      if (lane == 0) barrier_arrive(empty(index));
    };
    // The groups' turns at the tensor cores.
    const auto my_turn = [&] {
      named_sync(1 + group, 256);
    };
    const auto your_turn = [&] {
      named_arrive(2 - group, 256);
    };
    if (group == 1) named_arrive(1, 256);  // the first is the first group's

    for (int item = static_cast<int>(blockIdx.x); item < items;
         item += static_cast<int>(gridDim.x)) {
      const HopperItem x(p, item);
      const std::int64_t own = x.first + group * kGroupQueries + warp * 16 + g;  // and own + 8
      const int count = x.count();
      float reference[2] = {-kInfinity, -kInfinity};
      float sum[2] = {0, 0};
      float out[64];
#pragma unroll
      for (int i = 0; i < 64; ++i) out[i] = 0;
      std::uint32_t weights[32];
      float factor[2];
      bool grown = false;  // whether a factor is not 1

      // Probabilities of scores of a tile in place, the running reference and sum moved on.
      const auto softmax = [&](auto& s, auto blocks) {
        constexpr int kBlocks = decltype(blocks)::value;
        grown = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float most = -kInfinity;
#pragma unroll
          for (int b = 0; b < kBlocks; ++b)
            most = fmaxf(most, fmaxf(s[4 * b + 2 * half], s[4 * b + 2 * half + 1]));
          most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 1));
          most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 2));
          most *= p.scale_log2;
          const bool follow = most > reference[half] + kReferenceSlack;
          grown = grown || follow;
          most = follow ? most : reference[half];
          const float shift = most == -kInfinity ? 0 : most;
          factor[half] = power_of_two(reference[half] - shift);
          reference[half] = most;
          float total = 0;
#pragma unroll
          for (int b = 0; b < kBlocks; ++b)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float& y = s[4 * b + 2 * half + i];
              y = power_of_two(fmaf(y, p.scale_log2, -shift));
              total += y;
            }
          sum[half] = sum[half] * factor[half] + total;
        }
      };
      const auto round_weights = [&](const auto& s, auto blocks) {
#pragma unroll
        for (int b = 0; b < decltype(blocks)::value; ++b) {
          weights[2 * b] = H::pack(s[4 * b], s[4 * b + 1]);
          weights[2 * b + 1] = H::pack(s[4 * b + 2], s[4 * b + 3]);
        }
      };
      // Slots that never held a token may hold anything, NaN included, and 0 * NaN is not 0.
      const auto clear_rows = [&](std::uint32_t at, int rows, int from) {
        if (from >= rows || p.written >= p.sinks + p.ring) return;
        for (int i = tid % 128; i < (rows - from) * 16; i += 128) {
          const int row = from + i / 16;
          const std::uint32_t to = at + (i % 16 / 8) * (rows * 128) + row * 128 + i % 8 * 16;
          asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        named_sync(3 + group, 128);
      };

      if (x.sinks_seen > 0) {
        const int sink_queries = turn.index;
        barrier_wait(full(turn.index), turn.parity);
        turn.next();
        barrier_wait(full(turn.index), turn.parity);
        const std::uint32_t q = buffers + sink_queries * kItemBufferBytes + group * 8192;
        const std::uint32_t k = buffers + turn.index * kItemBufferBytes;
        const std::uint32_t v = k + 2 * kItemSinks * 128;
        clear_rows(v, kItemSinks, max(p.written, 0));
        float s[8];
        group_fence();
#pragma unroll
        for (int step = 0; step < 8; ++step)
          group_multiply<Element>(s, operand(q + step / 4 * kItemPanelBytes + step % 4 * 32),
                                  operand(k + step / 4 * (kItemSinks * 128) + step % 4 * 32),
                                  step > 0 ? 1 : 0);
        group_commit();
        group_wait<0>();
        settle(s);
        release(sink_queries);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int key = i / 4 * 8 + 2 * t + i % 2;
          if (key >= p.sinks || key > own + i % 4 / 2 * 8) s[i] = -kInfinity;
        }
        softmax(s, std::integral_constant<int, 2>());
        round_weights(s, std::integral_constant<int, 2>());
        group_fence();
        group_multiply_add<Element>(out, weights, operand(v, kItemSinks * 128));
        group_commit();
        group_wait<0>();
        settle(out);
        release(turn.index);
        turn.next();
      }

      const std::int64_t last = p.base + min(x.first_token + kItemQueries, p.tokens) - 1;
      // Scores of keys that a query does not see, of tile n.
      const auto mask = [&](float(&s)[64], int n) {
        const std::int64_t from = x.oldest + x.before(n);
        const int present = x.present(n);
        if (present == kItemKeys && from + kItemKeys - 1 <= x.first && from > last - p.window)
          return;
        const int causal = static_cast<int>(own - from);  // the last key that row g sees
        const auto oldest_seen =
            static_cast<int>(max(own - from - p.window + 1, -std::int64_t{1 << 20}));
#pragma unroll
        for (int b = 0; b < 16; ++b)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int key = 8 * b + 2 * t + i % 2;
            const int row = i / 2 * 8;
            if (key >= present || key > causal + row || key < oldest_seen + row)
              s[4 * b + i] = -kInfinity;
          }
      };
      const auto score = [&](float(&s)[64], std::uint32_t k) {
        const std::uint64_t a = operand(queries + group * kGroupQueries * 128);
        const std::uint64_t b = operand(k);
#pragma unroll
        for (int step = 0; step < 8; ++step)
          group_multiply<Element>(s, operand_at(a, step / 4 * kItemPanelBytes + step % 4 * 32),
                                  operand_at(b, step / 4 * kItemPanelBytes + step % 4 * 32),
                                  step > 0 ? 1 : 0);
      };
      const auto weigh = [&](std::uint32_t v) {
        const std::uint64_t b = operand(v, kItemPanelBytes);
#pragma unroll
        for (int step = 0; step < 8; ++step)
          group_multiply_add<Element>(out, weights + 4 * step, operand_at(b, step * 2048));
      };
      const auto rescale = [&] {
        if (!__any_sync(0xffffffffU, grown)) return;
#pragma unroll
        for (int i = 0; i < 64; ++i) out[i] *= factor[i % 4 / 2];
      };

      barrier_wait(query_full, query_parity);
      query_parity ^= 1;
      if (count > 0) {
        float s[64];
        barrier_wait(full(turn.index), turn.parity);
        my_turn();
        group_fence();
        score(s, buffers + turn.index * kItemBufferBytes);
        group_commit();
        your_turn();
        group_wait<0>();
        settle(s);
        release(turn.index);
        turn.next();
        mask(s, 0);
        softmax(s, std::integral_constant<int, 16>());
        rescale();
        round_weights(s, std::integral_constant<int, 16>());
        for (int n = 1; n < count; ++n) {
          const int key_index = turn.index;
          barrier_wait(full(key_index), turn.parity);
          turn.next();
          my_turn();
          group_fence();
          score(s, buffers + key_index * kItemBufferBytes);
          group_commit();
          const int value_index = turn.index;
          const std::uint32_t v = buffers + value_index * kItemBufferBytes;
          barrier_wait(full(value_index), turn.parity);
          turn.next();
          clear_rows(v, kItemKeys, max(p.written - x.slot(n - 1), 0));
          group_fence();
          weigh(v);
          group_commit();
          your_turn();
          group_wait<1>();
          settle(s);
          release(key_index);
          mask(s, n);
          softmax(s, std::integral_constant<int, 16>());
          finish(sum[0] + sum[1]);
          group_wait<0>();
          settle(out);
          release(value_index);
          rescale();
          round_weights(s, std::integral_constant<int, 16>());
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(query_empty);
      if (count > 0) {
        barrier_wait(full(turn.index), turn.parity);
        const std::uint32_t v = buffers + turn.index * kItemBufferBytes;
        clear_rows(v, kItemKeys, max(p.written - x.slot(count - 1), 0));
        group_fence();
        weigh(v);
        group_commit();
        group_wait<0>();
        settle(out);
        release(turn.index);
        turn.next();
      }

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[half] += __shfl_xor_sync(0xffffffffU, sum[half], 1);
        sum[half] += __shfl_xor_sync(0xffffffffU, sum[half], 2);
        const int token = x.first_token + group * kGroupQueries + warp * 16 + g + 8 * half;
        const float scale = 1 / sum[half];  // a query sees itself: never 0
        const std::int64_t at =
            (static_cast<std::int64_t>(token) * p.num_qo_heads + x.head) * kItemDim;
        if (p.wide) {
          float* const row = static_cast<float*>(p.out) + at + 2 * t;
#pragma unroll
          for (int c = 0; c < 16; ++c)
            if (token < p.tokens)
              *reinterpret_cast<float2*>(row + 8 * c) = {out[4 * c + 2 * half] * scale,
                                                         out[4 * c + 2 * half + 1] * scale};
          continue;
        }
        std::uint16_t* const row = static_cast<std::uint16_t*>(p.out) + at + 8 * t;
        // A lane holds 2 of each 8 channels; four turn theirs so that each stores 8 side by side.
#pragma unroll
        for (int c = 0; c < 16; c += 4) {
          std::uint32_t y[4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            y[i] = H::pack(out[4 * (c + i) + 2 * half] * scale,
                           out[4 * (c + i) + 2 * half + 1] * scale);
          exchange(y[0], y[1], 1, t % 2 == 1);
          exchange(y[2], y[3], 1, t % 2 == 1);
          exchange(y[0], y[2], 2, t >= 2);
          exchange(y[1], y[3], 2, t >= 2);
          if (token < p.tokens)
            *reinterpret_cast<uint4*>(row + 8 * c) = make_uint4(y[0], y[1], y[2], y[3]);
        }
      }
    }
  }
#endif
}

/// A tensor for the copy engine: 16-bit elements, 128-byte swizzle, zeros outside. dims, box: from
/// the fastest; strides: bytes, from the second.
/// \throws Error(kDevice) if the driver refuses it.
template <class Element, int kRank>
CUtensorMap tensor_map(const void* data, const std::uint64_t (&dims)[kRank],
                       const std::uint64_t (&strides)[kRank - 1],
                       const std::uint32_t (&box)[kRank]) {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                cudaEnableDefault, &found),
               "cudaGetDriverEntryPointByVersion");
#else
    check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found),
               "cudaGetDriverEntryPoint");
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  CUtensorMap map{};
  std::uint32_t steps[kRank];
  for (std::uint32_t& step : steps) step = 1;
  const CUresult status =
      encode == nullptr
          ? CUDA_ERROR_NOT_FOUND
          : encode(&map,
                   std::is_same_v<Element, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                   kRank, const_cast<void*>(data), dims, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw Error(ErrorCode::kDevice,
                {"the driver refuses a tensor map", "tensor_map", "cuTensorMapEncodeTiled",
                 "CUDA_SUCCESS", std::to_string(static_cast<int>(status))});
  return map;
}

/// Whether this machine runs the kernel above, and the multiprocessors it has.
inline int hopper_multiprocessors() {
  int device = 0;
  int major = 0;
  int minor = 0;
  int count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
             "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
             "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  return major == 9 && minor == 0 ? count : 0;
}

}  // namespace sluice::detail
