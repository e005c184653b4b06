// SPDX-License-Identifier: MIT
/// Attention over a list of segments on the GPU: what attend() is on the CPU, for 1 to 16 queries
/// of each session of a batch. Lists, their visible prefixes and the readers' places are read from
/// device memory, so that a captured launch can be replayed while all of them change.
///
/// How it works. As in decode_attention.cuh rows go from memory straight into the registers in
/// which the tensor cores want them, scores are formed as keys x queries, and queries and
/// probabilities enter as the sum of two 16-bit numbers. Columns are the queries of a KV head:
/// token by token, in each the heads that share it, 8 to a matrix instruction; so any ratio of
/// heads and any number of queries fills them. Segments are cut into tiles of 16 entries, tiles
/// of the whole list are dealt to blocks in consecutive shares and there to warps in turn. Segments
/// in a row that are read from one place (shift and ceiling) are a run; a block holds its queries
/// as rotated for up to four runs at once, and rotates anew only where its share has more. What
/// does not hang together is asked for at once: the list before its length is known, queries and
/// frequencies beside it, the first keys before queries are rotated. Codes of 8 bits become bf16
/// exactly; scales are applied to scores and weights in float32. Warps merge in shared memory,
/// blocks of a cluster in that of their first (sm_90), clusters through a scratch that the last to
/// arrive reads; always in the order of the list, so repeated runs give the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/decode_attention.cuh"
#include "sluice/backend/cuda/decode_step.cuh"
#include "sluice/backend/cuda/memory.cuh"
#include "sluice/backend/cuda/variant.cuh"
#include "sluice/core/element.hpp"

namespace sluice {

namespace device {

inline constexpr double kNoCeiling = std::numeric_limits<double>::infinity();

/// sluice::Segment with its rule, in device memory: the same members, the same meaning; keys are
/// rotated. Element: bf16, f16, fp8_e4m3 or int8_t; the last two with a float scale for each row.
/// Rows begin at multiples of 16 bytes.
template <class Element>
struct Segment {
  std::int64_t first_index = 0;
  std::int64_t count = 0;
  std::int64_t visible = 0;
  /// Tokens of the segment's group that the reader sees, in device memory, read when attention
  /// starts: of the segment the entries with a smaller index. Null: `visible` alone rules. It must
  /// not change before all layers of a step have read it: a snapshot, not the writer's counter.
  const std::int64_t* visible_tokens = nullptr;
  double first_position = 0;
  double shift = 0;
  double ceiling = kNoCeiling;
  std::int32_t kind = 0;
  std::int32_t group = 0;

  const Element* keys = nullptr;    ///< [heads of the class, count, head_dim] by the strides
  const Element* values = nullptr;  ///< likewise
  std::int64_t key_head_stride = 0;
  std::int64_t key_token_stride = 0;
  std::int64_t value_head_stride = 0;
  std::int64_t value_token_stride = 0;
  const float* key_scales = nullptr;  ///< null: not quantised
  const float* value_scales = nullptr;
  std::int64_t key_scale_head_stride = 0;
  std::int64_t key_scale_token_stride = 0;
  std::int64_t value_scale_head_stride = 0;
  std::int64_t value_scale_token_stride = 0;
};

/// Who reads: the queries of one session.
struct SegmentReader {
  std::int64_t first_index = 0;  ///< stream index of query 0; the others follow
  double first_position = 0;     ///< where it stands; the others follow by ones
  std::int32_t queries = 0;      ///< 0: the session is idle, nothing of it is read or written
  std::int32_t padding = 0;
};

}  // namespace device

/// Extents of segment attention.
struct SegmentAttentionShape {
  std::int64_t num_qo_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t batch_size = 1;
  std::int64_t max_queries = 1;    ///< of a session: 1 to 16
  std::int64_t max_segments = 16;  ///< of a list: at most 512
  std::int64_t max_keys = 4096;    ///< of a list, about: how launches are cut depends on it, only
  /// KV heads of a layer that share a list, class by class, as AttentionQuery::kv_heads: entry j of
  /// a class is row j of its segments' head axis. Every KV head is in one class. Empty: all heads
  /// are one class, in order.
  std::vector<std::vector<std::int32_t>> head_classes = {};

  std::int64_t num_classes() const {
    return head_classes.empty() ? 1 : static_cast<std::int64_t>(head_classes.size());
  }
};

/// What the heads of a call are rotated by; none: queries come rotated, or nothing rotates.
struct SegmentRotation {
  std::span<const double> frequencies = {};  ///< [num_pairs], radians per token
  double attention_factor = 1;
  bool interleaved = false;
};

/// Tensors of one layer's call, in device memory. Strides in elements; heads and channels are
/// consecutive.
struct SegmentAttentionTensors {
  const void* query = nullptr;  ///< [batch, max_queries, num_qo_heads, head_dim], not rotated
  std::int64_t query_session_stride = 0;
  std::int64_t query_token_stride = 0;
  ElementType input_type = ElementType::kF32;  ///< kF32, kF16 or kBF16
  void* out = nullptr;                         ///< the same extents, of `output_type`
  std::int64_t out_session_stride = 0;
  std::int64_t out_token_stride = 0;
  ElementType output_type = ElementType::kF32;
  float* lse = nullptr;  ///< [batch, max_queries, num_qo_heads], no gaps, or null
};

/// Lists and readers in device memory, as launches take them.
template <class Element>
struct SegmentListsView {
  const device::Segment<Element>* segments = nullptr;  ///< [batch, classes, max_segments]
  const std::int32_t* counts = nullptr;                ///< [batch, classes]
  const device::SegmentReader* readers = nullptr;      ///< [batch]
};

/// The lists and readers of a batch, in device memory: [batch, classes, max_segments].
/// Only construction allocates.
template <class Element>
class SegmentLists {
 public:
  /// \throws Error(kDevice).
  explicit SegmentLists(const SegmentAttentionShape& shape)
      : classes_(shape.num_classes()),
        max_segments_(shape.max_segments),
        segments_(static_cast<std::size_t>(shape.batch_size * classes_ * max_segments_)),
        counts_(static_cast<std::size_t>(shape.batch_size * classes_)),
        readers_(static_cast<std::size_t>(shape.batch_size)) {}

  /// Copies a list to the device. Waits for the stream. \throws Error(kShape) if it is too long.
  void set(std::int64_t session, std::int64_t head_class,
           std::span<const device::Segment<Element>> list, cudaStream_t stream = nullptr) {
    if (static_cast<std::int64_t>(list.size()) > max_segments_)
      throw Error(ErrorCode::kShape,
                  {"too many segments", "SegmentLists::set", "segments",
                   "at most " + std::to_string(max_segments_), std::to_string(list.size())});
    const std::int64_t at = session * classes_ + head_class;
    const auto count = static_cast<std::int32_t>(list.size());
    check_cuda(cudaMemcpyAsync(segments_.data() + at * max_segments_, list.data(),
                               list.size_bytes(), cudaMemcpyHostToDevice, stream),
               "cudaMemcpyAsync");
    check_cuda(
        cudaMemcpyAsync(counts_.data() + at, &count, sizeof(count), cudaMemcpyHostToDevice, stream),
        "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }
  /// One reader per session. Waits for the stream. \throws Error(kShape) if there are more.
  void set_readers(std::span<const device::SegmentReader> readers, cudaStream_t stream = nullptr) {
    readers_.upload(readers, stream);
  }

  /// What launches read, from a session on.
  SegmentListsView<Element> view(std::int64_t session = 0) const {
    return {segments_.data() + session * classes_ * max_segments_,
            counts_.data() + session * classes_, readers_.data() + session};
  }

  /// For kernels that write lists themselves.
  device::Segment<Element>* segments() { return segments_.data(); }
  std::int32_t* counts() { return counts_.data(); }
  device::SegmentReader* readers() { return readers_.data(); }

 private:
  std::int64_t classes_;
  std::int64_t max_segments_;
  Buffer<device::Segment<Element>, cuda> segments_;
  Buffer<std::int32_t, cuda> counts_;
  Buffer<device::SegmentReader, cuda> readers_;
};

namespace detail {

/// Warps of a block, as registers allow: one block fills a multiprocessor.
template <int kHeadDim, int kColumnTiles>
inline constexpr int kSegmentWarps = kHeadDim <= 128 && kColumnTiles == 1 ? 12 : 8;
/// Places whose queries a block holds at once.
template <int kColumnTiles>
inline constexpr int kQueryPlaces = 4 / kColumnTiles;
inline constexpr int kMaxListSegments = 512;
inline constexpr int kMaxSegmentQueries = 16;
inline constexpr int kLeastTiles = 4;  // that a block is worth
inline constexpr float kLog2E = 1.44269504088896340736F;

template <class Element, class Variant>
struct SegmentAttentionParams {
  const device::Segment<Element>* segments;
  const std::int32_t* counts;
  const device::SegmentReader* readers;
  const std::int32_t* head_class;  // [num_kv_heads]
  const std::int32_t* head_row;    // [num_kv_heads]
  const TurnFrequency* frequencies;
  const void* query;
  void* out;
  float* lse;
  float* partials;  // [units, clusters, columns of a block, head_dim]
  float2* states;   // [units, clusters, columns of a block]: maximum (log2), sum
  int* arrivals;    // [units], zero between launches
  std::int64_t query_session_stride;
  std::int64_t query_token_stride;
  std::int64_t out_session_stride;
  std::int64_t out_token_stride;
  float attention_factor;
  int classes;
  int max_segments;
  int max_queries;
  int group;                     // query heads per KV head
  std::uint64_t group_inverse;   // 2^32 / group, rounded up: divisions without their latency
  std::uint64_t splits_inverse;  // 2^36 / splits, rounded up
  int column_blocks;             // blocks that share a KV head
  int num_pairs;
  bool interleaved;
  ElementType input_type;
  ElementType output_type;
  Variant variant;
};

/// How rows of a stored type become operands of the tensor cores: pairs of channels in 16 bits
/// each. kBytes: of a channel.
template <class Element>
struct StoredRow {
  using H = Half<Element>;
  static constexpr int kBytes = 2;
  static constexpr bool kScaled = false;
};

__device__ inline std::uint32_t fused_multiply_add_bf16(std::uint32_t a, std::uint32_t b,
                                                        std::uint32_t c) {
  std::uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

template <>
struct StoredRow<std::int8_t> {
  using H = Half<bf16>;
  static constexpr int kBytes = 1;
  static constexpr bool kScaled = true;
  /// Channels 2 * which and the next of four. The low 7 bits behind the exponent of 128 are 128 +
  /// them; less 128, or 256 where the sign is set: exact.
  static __device__ std::uint32_t pair(std::uint32_t four, int which) {
    const unsigned bytes = which == 0 ? 0x4140 : 0x4342;
    const std::uint32_t low = __byte_perm(four & 0x7f7f7f7fU, 0x43434343U, bytes);
    const std::uint32_t minus = __byte_perm(four & 0x80808080U, 0xc3c3c3c3U, bytes);  // -128, -256
    return fused_multiply_add_bf16(low, 0x3f803f80U, minus);
  }
};

template <>
struct StoredRow<fp8_e4m3> {
  using H = Half<bf16>;
  static constexpr int kBytes = 1;
  static constexpr bool kScaled = true;
  /// Exponent and mantissa in their places of a bf16, times 2^120 for the exponents' other bias:
  /// exact, subnormal codes included. The code of NaN, which no quantised row holds, reads as 480.
  static __device__ std::uint32_t pair(std::uint32_t four, int which) {
    // A product and a sum where a shift and an or would do: those have half the throughput.
    const std::uint32_t low = __byte_perm(four & 0x7f7f7f7fU, 0, which == 0 ? 0x4140 : 0x4342);
    const std::uint32_t sign = __byte_perm(four & 0x80808080U, 0, which == 0 ? 0x1404 : 0x3424);
    const std::uint32_t y = low * 16 + sign;
    return fused_multiply_add_bf16(y, 0x7b807b80U, 0x80008000U);
  }
};

/// The same address, from which the compiler cannot take the sum apart again: what is added to it
/// later are constants of the loads, not a sum of 64 bits for each.
__device__ inline const unsigned char* settled(const unsigned char* address) {
  asm("" : "+l"(address));
  return address;
}

/// KeyFragment for rows of any stored type.
template <class Element, int kHeadDim>
struct StoredKeys {
  using Row = StoredRow<Element>;
  static constexpr int kBytes = Row::kBytes;
  std::uint32_t raw[2][kHeadDim * kBytes / 16];

  __device__ void load(const unsigned char* const (&row)[2], int t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned char* const from = settled(row[half] + 8 * kBytes * t);
#pragma unroll
      for (int c = 0; c < kHeadDim / 32; ++c)
        stream_load(&raw[half][2 * kBytes * c],
                    reinterpret_cast<const std::uint16_t*>(from + 32 * kBytes * c),
                    std::integral_constant<int, 2 * kBytes>());
    }
    if constexpr (kHeadDim % 32 == 16) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        stream_load(&raw[half][kHeadDim / 32 * 2 * kBytes],
                    reinterpret_cast<const std::uint16_t*>(row[half] +
                                                           (kHeadDim / 32 * 32 + 4 * t) * kBytes),
                    std::integral_constant<int, kBytes>());
    }
  }
  __device__ std::uint32_t pair(int half, int i) const {
    if constexpr (kBytes == 2)
      return raw[half][i];
    else
      return Row::pair(raw[half][i / 2], i % 2);
  }
};

/// ValueFragment for rows of any stored type.
template <class Element, int kHeadDim>
struct StoredValues {
  using Row = StoredRow<Element>;
  static constexpr int kBytes = Row::kBytes;
  static constexpr int kRest = kHeadDim % 64 / 16;  // pairs of channels behind the runs of 64
  static constexpr int kWords = kHeadDim / 64 * 2 * kBytes + (kRest * kBytes + 1) / 2;
  std::uint32_t raw[4][kWords];

  __device__ void load(int j, const unsigned char* row, int g) {
    const unsigned char* const run = settled(row + 8 * kBytes * g);
#pragma unroll
    for (int c = 0; c < kHeadDim / 64; ++c)
      stream_load(&raw[j][2 * kBytes * c],
                  reinterpret_cast<const std::uint16_t*>(run + 64 * kBytes * c),
                  std::integral_constant<int, 2 * kBytes>());
    static_assert(kRest < 3, "no vector load of three registers");
    if constexpr (kRest > 0) {
      const auto* const from = reinterpret_cast<const std::uint16_t*>(
          row + (kHeadDim / 64 * 64 + 2 * kRest * g) * kBytes);
      std::uint32_t* const to = &raw[j][kHeadDim / 64 * 2 * kBytes];
      if constexpr (kRest * kBytes == 1)
        stream_load_half_word(to, from);
      else
        stream_load(to, from, std::integral_constant<int, kRest * kBytes / 2>());
    }
  }
  __device__ void clear(int j) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) raw[j][i] = 0;
  }
  __device__ std::uint32_t pair(int j, int i) const {
    if constexpr (kBytes == 2)
      return raw[j][i];
    else
      return Row::pair(raw[j][i / 2], i % 2);
  }
};

__device__ inline float load_input(const void* data, ElementType type, std::int64_t index) {
  if (type == ElementType::kF32) return static_cast<const float*>(data)[index];
  const std::uint32_t bits = static_cast<const std::uint16_t*>(data)[index];
  return type == ElementType::kBF16 ? Half<bf16>::low(bits) : Half<f16>::low(bits);
}

/// A counter that another stream may be writing.
__device__ inline std::int64_t load_acquire(const std::int64_t* from) {
  std::int64_t x;
  asm volatile("ld.acquire.gpu.global.s64 %0, [%1];" : "=l"(x) : "l"(from) : "memory");
  return x;
}

/// Adds `count` parts up, in order, a batch of loads at a time; a part's weight is
/// 2^(its maximum - the highest).
template <int kBatch, class StateOf, class PartOf>
__device__ float2 merge_parts(int count, const StateOf& state_of, const PartOf& part_of,
                              float4& total) {
  const float kInfinity = __int_as_float(0x7f800000);
  float most = -kInfinity;
  float sum = 0;
  total = {0, 0, 0, 0};
  for (int first = 0; first < count; first += kBatch) {
    float2 states[kBatch];
    float4 parts[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int from = min(first + i, count - 1);
      states[i] = state_of(from);
      parts[i] = part_of(from);
      if (first + i >= count) states[i] = {-kInfinity, 0};
    }
    float grown = most;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) grown = fmaxf(grown, states[i].x);
    const float base = grown == -kInfinity ? 0 : grown;
    const float keep = power_of_two(most - base);
    most = grown;
    sum *= keep;
    total = {total.x * keep, total.y * keep, total.z * keep, total.w * keep};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float weight = power_of_two(states[i].x - base);
      sum += states[i].y * weight;
      total.x += parts[i].x * weight;
      total.y += parts[i].y * weight;
      total.z += parts[i].z * weight;
      total.w += parts[i].w * weight;
    }
  }
  return {most, sum};
}

/// Where a segment's rows of one KV head lie, and what visibility asks of them. Strides in bytes.
struct SegmentRows {
  const unsigned char* keys;
  const unsigned char* values;
  std::int64_t key_stride;
  std::int64_t value_stride;
  std::int64_t first_index;
  std::int32_t kind;
  std::int32_t group;
  const float* key_scales;  // these only where rows are scaled; strides in elements
  const float* value_scales;
  std::int64_t key_scale_stride;
  std::int64_t value_scale_stride;
};

template <class Element>
__device__ SegmentRows segment_rows(const device::Segment<Element>& x, std::int64_t head_row) {
  constexpr int kBytes = StoredRow<Element>::kBytes;
  SegmentRows rows{
      .keys = reinterpret_cast<const unsigned char*>(x.keys + head_row * x.key_head_stride),
      .values = reinterpret_cast<const unsigned char*>(x.values + head_row * x.value_head_stride),
      .key_stride = x.key_token_stride * kBytes,
      .value_stride = x.value_token_stride * kBytes,
      .first_index = x.first_index,
      .kind = x.kind,
      .group = x.group,
      .key_scales = nullptr,
      .value_scales = nullptr,
      .key_scale_stride = 0,
      .value_scale_stride = 0};
  if constexpr (StoredRow<Element>::kScaled) {
    rows.key_scales = x.key_scales + head_row * x.key_scale_head_stride;
    rows.value_scales = x.value_scales + head_row * x.value_scale_head_stride;
    rows.key_scale_stride = x.key_scale_token_stride;
    rows.value_scale_stride = x.value_scale_token_stride;
  }
  return rows;
}

/// All of a segment that an element type needs, in one round of loads. Volatile, so that they are
/// under way before it is known whether the list is that long.
template <class Element>
__device__ device::Segment<Element> load_segment(const device::Segment<Element>* from) {
  using Segment = device::Segment<Element>;
  static_assert(sizeof(Segment) % 16 == 0 && std::is_trivially_copyable_v<Segment>);
  constexpr int kNeeded = static_cast<int>(
      (StoredRow<Element>::kScaled ? sizeof(Segment) : offsetof(Segment, key_scales)) / 16);
  ulonglong2 words[sizeof(Segment) / 16] = {};
#pragma unroll
  for (int i = 0; i < kNeeded; ++i)
    asm volatile("ld.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(words[i].x), "=l"(words[i].y)
                 : "l"(reinterpret_cast<const ulonglong2*>(from) + i));
  Segment segment;
  std::memcpy(&segment, words, sizeof(segment));
  return segment;
}

/// rotation_at() in two floats behind the whole turns: as near as a float32 sine is.
__device__ inline float2 short_rotation_at(double position, TurnFrequency f) {
  const double turns = position * f.high;
  const double rest = fma(position, f.high, -turns) + position * f.low;
  const double part = (turns - rint(turns)) + rest;
  const float near = static_cast<float>(part);
  const float beyond = static_cast<float>(part - near) * (2 * std::numbers::pi_v<float>);
  float sine;
  float cosine;
  sincospif(2 * near, &sine, &cosine);
  return {cosine - sine * beyond, sine + cosine * beyond};
}

/// Counts an arrival; what blocks wrote before theirs is visible after it.
__device__ inline int arrive(int* counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

/// Dynamic shared memory of a block, in bytes. First the list; then queries at the block's places,
/// queries as they came and frequencies; in their place at the end the warps' parts of up to 8
/// columns. Behind them, in a cluster's first block, the parts of its blocks.
template <int kHeadDim, int kColumnTiles>
struct SegmentMemory {
  static constexpr int kWarps = kSegmentWarps<kHeadDim, kColumnTiles>;
  static constexpr int kColumns = kDecodeHeads * kColumnTiles;
  static constexpr int kPlaceQueries = 2 * kColumns * kQueryRow<kHeadDim>;  // elements
  static constexpr int kRaw = kQueryPlaces<kColumnTiles> * kPlaceQueries * 2;
  static constexpr int kFrequencies = kRaw + kColumns * kHeadDim * 4;
  static constexpr int kFirst =
      kFrequencies + kHeadDim / 2 * static_cast<int>(sizeof(TurnFrequency));

  static __host__ __device__ constexpr int list(int max_segments) {
    constexpr int kOfSegment = static_cast<int>(sizeof(SegmentRows) + sizeof(double2)) +
                               2 * static_cast<int>(sizeof(int) + sizeof(std::uint16_t));
    return (max_segments * kOfSegment + 8 + 15) / 16 * 16;  // 8: an end for two of the tables
  }
  /// Behind the list; columns: of a block, at most.
  static __host__ __device__ constexpr int block_parts(int columns) {
    const int width = columns < kDecodeHeads ? columns : kDecodeHeads;
    const int parts = kWarps * width * (kHeadDim + kPartPadding + 2) * 4;
    return ((kFirst > parts ? kFirst : parts) + 15) / 16 * 16;
  }
  static constexpr int bytes(int max_segments, int columns, int cluster) {
    return list(max_segments) + block_parts(columns) +
           (cluster > 1 ? cluster * columns * (kHeadDim + 2) * 4 : 0);
  }
};

template <class Element, int kHeadDim, int kColumnTiles, class Variant>
__global__ void __launch_bounds__(kSegmentWarps<kHeadDim, kColumnTiles>* kWarpSize, 1)
    segment_attention_kernel(const __grid_constant__ SegmentAttentionParams<Element, Variant> p) {
  using Row = StoredRow<Element>;
  using H = typename Row::H;
  using Memory = SegmentMemory<kHeadDim, kColumnTiles>;
  using Transform = decltype(p.variant.transform);
  constexpr bool kPlain = std::remove_cv_t<Transform>::kIdentity;
  constexpr int kWarps = Memory::kWarps;
  constexpr int kThreads = kWarps * kWarpSize;
  constexpr int kPlaces = kQueryPlaces<kColumnTiles>;
  constexpr int kRow = kQueryRow<kHeadDim>;
  constexpr int kChannelTiles = kHeadDim / 16;
  constexpr int kPart = kHeadDim + kPartPadding;
  constexpr int kColumns = Memory::kColumns;
  constexpr int kPairs = kHeadDim / 2;
  const float kInfinity = __int_as_float(0x7f800000);

  __shared__ __align__(16) unsigned char reader_memory[sizeof(device::SegmentReader)];
  __shared__ int list_runs;
  __shared__ int last_block;
  __shared__ std::uint64_t arrived;  // bytes from the other blocks of the cluster
  extern __shared__ __align__(16) unsigned char dynamic[];
  SegmentRows* const list_rows = reinterpret_cast<SegmentRows*>(dynamic);
  double2* const places = reinterpret_cast<double2*>(list_rows + p.max_segments);  // shift, ceiling
  int* const entries = reinterpret_cast<int*>(places + p.max_segments);            // visible ones
  int* const tile_begin = entries + p.max_segments;  // of each segment, and the end
  // Runs are segments at one place: the run of a segment; the first segment of a run, and the end.
  std::uint16_t* const run_of = reinterpret_cast<std::uint16_t*>(tile_begin + p.max_segments + 1);
  std::uint16_t* const run_begin = run_of + p.max_segments;
  unsigned char* const working = dynamic + Memory::list(p.max_segments);
  // [places, 2 (high, low parts), columns, kRow]
  std::uint16_t* const queries = reinterpret_cast<std::uint16_t*>(working);
  unsigned char* const raw_queries = working + Memory::kRaw;
  TurnFrequency* const frequencies =
      reinterpret_cast<TurnFrequency*>(working + Memory::kFrequencies);

  const int tid = static_cast<int>(threadIdx.x);
  const int warp = tid / kWarpSize;
  const int lane = tid % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  const int splits = static_cast<int>(gridDim.x);
  const int split = static_cast<int>(blockIdx.x);
  int kv_head = static_cast<int>(blockIdx.y);
  int column_block = 0;
  if (p.column_blocks > 1) {
    kv_head /= p.column_blocks;
    column_block = static_cast<int>(blockIdx.y) - kv_head * p.column_blocks;
  }
  const std::int64_t session = blockIdx.z;
  const std::int64_t unit = session * gridDim.y + blockIdx.y;
  const ClusterPlace cluster = cluster_place();
  const int first_column = column_block * kColumns;

  // What no launch before this one writes.
#pragma unroll 1
  for (int i = tid; i < p.num_pairs; i += kThreads) copy_async(frequencies + i, p.frequencies + i);
  if (cluster.size > 1) {
    if (tid == 0) byte_barrier_init(&arrived);
    cluster_arrive();
  }
  wait_for_previous_kernel();
  let_next_kernel_start();

  // One round of loads: reader, list and queries, all of which there may be. The first warp asks
  // for the list before it knows how long that is, the others for queries. Reader and list go
  // through shared memory: a register that is still being loaded, used late, would have the loads
  // of keys wait for it and for each other (there are six scoreboards to a warp).
  const std::int64_t list = p.classes == 1 ? session : session * p.classes + p.head_class[kv_head];
  const device::Segment<Element>* const segments = p.segments + list * p.max_segments;
  const int count = p.counts[list];
  const int element_bytes = p.input_type == ElementType::kF32 ? 4 : 2;
  const int row_vectors = kHeadDim * element_bytes / 16;
  const int most_columns = min(kColumns, p.max_queries * p.group - first_column);
  const auto token_at = [&](int column) {
    return static_cast<int>(static_cast<std::uint64_t>(first_column + column) * p.group_inverse >>
                            32);
  };
  const auto keep = [&](int s, const device::Segment<Element>& segment, int head_row) {
    std::int64_t visible = min(segment.visible, segment.count);
    if (segment.visible_tokens != nullptr)
      visible = min(visible, load_acquire(segment.visible_tokens) - segment.first_index);
    entries[s] = static_cast<int>(max(visible, std::int64_t{0}));
    places[s] = {segment.shift, segment.ceiling};
    list_rows[s] = segment_rows(segment, head_row);
  };
  if (warp == 0) {
    const device::SegmentReader who = p.readers[session];
    const int head_row = p.head_row[kv_head];
    const device::Segment<Element> segment = load_segment(segments + min(lane, p.max_segments - 1));
    if (lane < count) keep(lane, segment, head_row);
    if (lane == 0) *reinterpret_cast<device::SegmentReader*>(reader_memory) = who;
  } else {
#pragma unroll 1
    for (int e = tid - kWarpSize; e < most_columns * row_vectors; e += kThreads - kWarpSize) {
      const int column = e / row_vectors;
      const int token = token_at(column);
      const int head = first_column + column - token * p.group;
      const std::int64_t row = session * p.query_session_stride + token * p.query_token_stride +
                               (kv_head * p.group + head) * kHeadDim;
      copy_async(raw_queries + 16 * e, static_cast<const unsigned char*>(p.query) +
                                           row * element_bytes + 16 * (e - column * row_vectors));
    }
  }
  copies_commit();
#pragma unroll 1
  for (int s = kWarpSize + tid; s < count; s += kThreads)
    keep(s, load_segment(segments + s), p.head_row[kv_head]);
  if (count > kWarpSize) __syncthreads();
  if (warp == 0) {  // where segments' tiles begin, and runs
    __syncwarp();
    int tiles_before = 0;
    int runs_before = 0;
    if (lane == 0) tile_begin[0] = 0;
#pragma unroll 1
    for (int first = 0; first < count; first += kWarpSize) {
      const int s = first + lane;
      int x = s < count ? (entries[s] + kDecodeTile - 1) / kDecodeTile : 0;
#pragma unroll
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int left = __shfl_up_sync(0xffffffffU, x, step);
        if (lane >= step) x += left;
      }
      const bool begins =
          s < count && (s == 0 || places[s].x != places[s - 1].x || places[s].y != places[s - 1].y);
      const unsigned all = __ballot_sync(0xffffffffU, begins);
      const int run = runs_before + __popc(all & (0xffffffffU >> (kWarpSize - 1 - lane))) - 1;
      if (s < count) {
        tile_begin[s + 1] = tiles_before + x;
        run_of[s] = static_cast<std::uint16_t>(run);
      }
      if (begins) run_begin[run] = static_cast<std::uint16_t>(s);
      tiles_before += __shfl_sync(0xffffffffU, x, kWarpSize - 1);
      runs_before += __popc(all);
    }
    if (lane == 0) {
      run_begin[runs_before] = static_cast<std::uint16_t>(count);
      list_runs = runs_before;
    }
  }
  copies_wait();
  __syncthreads();

  const device::SegmentReader reader =
      *reinterpret_cast<const device::SegmentReader*>(reader_memory);
  const int columns = min(kColumns, reader.queries * p.group - first_column);
  if (columns <= 0) return;
  const int tiles = tile_begin[count];
  const int share = max(
      kLeastTiles,
      static_cast<int>(static_cast<std::uint64_t>(tiles + splits - 1) * p.splits_inverse >> 36));
  const int begin = split * share;
  if (begin >= max(tiles, 1)) return;
  const int end = min(begin + share, tiles);

  // A column is one head of one token.
  const auto token_of = [&](int column) {
    return token_at(min(column, columns - 1));
  };
  const auto head_of = [&](int column) {
    const int last = min(column, columns - 1);
    return static_cast<std::int64_t>(kv_head) * p.group +
           (first_column + last - token_at(last) * p.group);
  };
  const int first_token = token_of(0);
  const int tokens = token_of(columns - 1) - first_token + 1;
  const auto reader_position = [&](int token, double2 place) {
    return fmin(reader.first_position + token + place.x, place.y);
  };

  // Queries as a reader at the places of some runs has them; base-2 scores unless a transform
  // comes.
  const auto rotate_queries = [&](int first_run, int runs) {
    const float scale = p.variant.sm_scale * (kPlain ? kLog2E : 1);
    const float rotated_scale = scale * p.attention_factor;
#pragma unroll 1
    for (int e = tid; e < columns * kPairs; e += kThreads) {
      const int column = e / kPairs;
      const int pair = e - column * kPairs;
      const int token = token_of(column);
      const bool rotated = pair < p.num_pairs;
      const bool halves = rotated && !p.interleaved;
      const int c0 = halves ? pair : 2 * pair;
      const int c1 = halves ? pair + p.num_pairs : 2 * pair + 1;
      const float by = rotated ? rotated_scale : scale;
      const float x =
          load_input(raw_queries, p.input_type, std::int64_t{column} * kHeadDim + c0) * by;
      const float y =
          load_input(raw_queries, p.input_type, std::int64_t{column} * kHeadDim + c1) * by;
#pragma unroll 1
      for (int i = 0; i < runs; ++i) {
        float2 turned{1, 0};
        if (rotated)
          turned = short_rotation_at(reader_position(token, places[run_begin[first_run + i]]),
                                     frequencies[pair]);
        const float a = x * turned.x - y * turned.y;
        const float b = y * turned.x + x * turned.y;
        const std::uint32_t high = H::pack(a, b);
        const std::uint32_t low = H::pack(a - H::low(high), b - H::high(high));
        std::uint16_t* const to = queries + i * Memory::kPlaceQueries + column * kRow;
        to[c0] = static_cast<std::uint16_t>(high);
        to[c1] = static_cast<std::uint16_t>(high >> 16);
        to[kColumns * kRow + c0] = static_cast<std::uint16_t>(low);
        to[kColumns * kRow + c1] = static_cast<std::uint16_t>(low >> 16);
      }
    }
  };

  // A tile of a warp.
  struct Tile {
    int at;  // segment
    int first_entry;
    int present;
    device::TileVisibility verdict;
  };
  int tile = 0;
  // Goes on to the next tile of [tile, tiles_end) that anybody sees; false: there is none.
  const auto open = [&](Tile& x, int tiles_end) {
    for (; tile < tiles_end; tile += kWarps) {
      while (tile >= tile_begin[x.at + 1]) ++x.at;
      const SegmentRows& rows = list_rows[x.at];
      x.first_entry = (tile - tile_begin[x.at]) * kDecodeTile;
      x.present = min(entries[x.at] - x.first_entry, kDecodeTile);
      const device::KeyInfo first{rows.first_index + x.first_entry, rows.kind, rows.group};
      x.verdict = p.variant.visibility.classify(reader.first_index + first_token,
                                                reader.first_index + first_token + tokens - 1,
                                                first, first.index + x.present - 1);
      if (x.verdict != device::TileVisibility::kNone) return true;
    }
    return false;
  };

  StoredKeys<Element, kHeadDim> key;
  StoredValues<Element, kHeadDim> value;
  float key_scale[2] = {1, 1};  // of entries g and g + 8
  float value_scale[2] = {1, 1};
  // Entries beyond the visible ones are read as the last of those and masked.
  const auto load_keys = [&](const Tile& x) {
    const SegmentRows& from = list_rows[x.at];
    const unsigned char* rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int entry = x.first_entry + min(g + 8 * half, x.present - 1);
      rows[half] = from.keys + entry * from.key_stride;
      if constexpr (Row::kScaled) {
        key_scale[half] = __ldg(from.key_scales + entry * from.key_scale_stride);
        value_scale[half] = __ldg(from.value_scales + entry * from.value_scale_stride);
      }
    }
    key.load(rows, t);
  };
  const auto value_slot = [&](int j) {
    return 2 * t + (j & 1) + 8 * (j >> 1);
  };
  const auto load_values = [&](const Tile& x) {
    const SegmentRows& from = list_rows[x.at];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      value.load(
          j, from.values + (x.first_entry + min(value_slot(j), x.present - 1)) * from.value_stride,
          g);
  };

  // Columns 8 n + 2 t + i: running maximum (the same in all lanes of a t), own share of the sum.
  float maximum[kColumnTiles][2];
  float sum[kColumnTiles][2];
  float out[kColumnTiles][kChannelTiles][4];
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      maximum[n][i] = -kInfinity;
      sum[n][i] = 0;
    }
#pragma unroll
    for (int c = 0; c < kChannelTiles; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][c][i] = 0;
  }

  // As many places at a time as there is room for queries.
  for (int next_tile = begin; next_tile < end;) {
    int at = 0;  // the segment of next_tile
#pragma unroll 1
    for (int first = 0; first < count; first += kWarpSize) {
      const int s = first + lane;
      const unsigned before =
          __ballot_sync(0xffffffffU, s < count && tile_begin[s + 1] <= next_tile);
      at += __popc(before);
      if (before != 0xffffffffU) break;
    }
    const int first_run = run_of[at];
    const int runs_end = min(first_run + kPlaces, list_runs);
    const int tiles_end = runs_end == list_runs ? end : min(end, tile_begin[run_begin[runs_end]]);

    // Keys are under way while queries are rotated; values are asked for behind them, as a
    // multiprocessor that has too many loads to issue issues nothing else.
    tile = next_tile + warp;
    Tile here{at, 0, 0, device::TileVisibility::kAll};
    bool more = open(here, tiles_end);
    if (more) load_keys(here);
    if (next_tile != begin) __syncthreads();  // all have read the queries before
    int runs = 1;                             // those of which the block has tiles
    while (first_run + runs < runs_end && tile_begin[run_begin[first_run + runs]] < tiles_end)
      ++runs;
    rotate_queries(first_run, runs);
    if (more) load_values(here);
    __syncthreads();
    while (more) {
      Tile next = here;  // found while keys are on their way
      tile += kWarps;
      const bool another = open(next, tiles_end);
      const std::uint16_t* const place_queries =
          queries + (run_of[here.at] - first_run) * Memory::kPlaceQueries;
      const bool whole =
          here.present == kDecodeTile && here.verdict == device::TileVisibility::kAll;
      float s[kColumnTiles][4];
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        if (n > 0 && n * kDecodeHeads >= columns) continue;
        float high[2][4] = {};  // two chains: matrix instructions wait for their accumulator
        float low[2][4] = {};
        // Columns without a query repeat the last, and are dropped.
        const int column = min(n * kDecodeHeads + g, columns - 1);
        const std::uint16_t* const q_high = place_queries + column * kRow;
        const std::uint16_t* const q_low = q_high + kColumns * kRow;
#pragma unroll
        for (int c = 0; c < kHeadDim / 32; ++c) {
          const uint4 qh = *reinterpret_cast<const uint4*>(q_high + 32 * c + 8 * t);
          const uint4 ql = *reinterpret_cast<const uint4*>(q_low + 32 * c + 8 * t);
          const std::uint32_t a0[4] = {key.pair(0, 4 * c), key.pair(1, 4 * c),
                                       key.pair(0, 4 * c + 1), key.pair(1, 4 * c + 1)};
          const std::uint32_t a1[4] = {key.pair(0, 4 * c + 2), key.pair(1, 4 * c + 2),
                                       key.pair(0, 4 * c + 3), key.pair(1, 4 * c + 3)};
          H::multiply_add(high[0], a0, qh.x, qh.y);
          H::multiply_add(low[0], a0, ql.x, ql.y);
          H::multiply_add(high[1], a1, qh.z, qh.w);
          H::multiply_add(low[1], a1, ql.z, ql.w);
        }
        if constexpr (kHeadDim % 32 == 16) {
          constexpr int i = kHeadDim / 8 - 2;
          constexpr int base = kHeadDim / 32 * 32;
          const uint2 qh = *reinterpret_cast<const uint2*>(q_high + base + 4 * t);
          const uint2 ql = *reinterpret_cast<const uint2*>(q_low + base + 4 * t);
          const std::uint32_t a[4] = {key.pair(0, i), key.pair(1, i), key.pair(0, i + 1),
                                      key.pair(1, i + 1)};
          H::multiply_add(high[0], a, qh.x, qh.y);
          H::multiply_add(low[0], a, ql.x, ql.y);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
          s[n][i] = ((high[0][i] + high[1][i]) + (low[0][i] + low[1][i])) * key_scale[i / 2];
        if constexpr (!kPlain) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int c = n * kDecodeHeads + 2 * t + i % 2;
            const device::ScorePlace place{head_of(c),
                                           segments[here.at].first_position +
                                               (here.first_entry + g + 8 * (i / 2)) -
                                               reader_position(token_of(c), places[here.at])};
            s[n][i] = p.variant.transform.apply(place, s[n][i]) * kLog2E;
          }
        }
      }
      unsigned seen[2] = {~0U, ~0U};  // a quad of bits for entries 0 to 7, 8 to 15
      if (!whole) {
        bool any[2] = {false, false};
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int c = n * kDecodeHeads + 2 * t + i % 2;
            if (n > 0 && n * kDecodeHeads >= columns) continue;
            const int entry = g + 8 * (i / 2);
            const int token = token_of(c);
            const SegmentRows& rows = list_rows[here.at];
            const device::KeyInfo info{rows.first_index + here.first_entry + entry, rows.kind,
                                       rows.group};
            const bool visible =
                entry < here.present &&
                (here.verdict == device::TileVisibility::kAll ||
                 p.variant.visibility.visible(
                     {reader.first_index + token, reader.first_position + token}, info));
            if (!visible) s[n][i] = -kInfinity;
            any[i / 2] = any[i / 2] || visible;
          }
        seen[0] = __ballot_sync(0xffffffffU, any[0]);
        seen[1] = __ballot_sync(0xffffffffU, any[1]);
      }
      const float weight_scale[2] = {value_scale[0], value_scale[1]};
      if (another) load_keys(next);

      if (!whole) {
        // A row that nobody sees may hold anything, NaN included, and 0 * NaN is not 0.
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if ((seen[j / 2] >> (4 * (2 * t + j % 2)) & 0xfU) == 0) value.clear(j);
      }
      std::uint32_t high[kColumnTiles][2];  // probabilities, columns x entries
      std::uint32_t low[kColumnTiles][2];
      float factor[kColumnTiles][2];
      bool rescale = false;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        if (n > 0 && n * kDecodeHeads >= columns) continue;
        float probability[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float most = fmaxf(s[n][i], s[n][i + 2]);
          most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 4));
          most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 8));
          most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 16));
          most = fmaxf(most, maximum[n][i]);
          const float base = most == -kInfinity ? 0 : most;  // nothing seen yet: e^-inf, not NaN
          factor[n][i] = power_of_two(maximum[n][i] - base);
          maximum[n][i] = most;
          probability[i] = power_of_two(s[n][i] - base);
          probability[i + 2] = power_of_two(s[n][i + 2] - base);
          sum[n][i] = sum[n][i] * factor[n][i] + (probability[i] + probability[i + 2]);
        }
        rescale = rescale || factor[n][0] != 1 || factor[n][1] != 1;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float a = probability[2 * half];
          float b = probability[2 * half + 1];
          if constexpr (Row::kScaled) {
            const bool unseen = (seen[half] >> (4 * g) & 0xfU) == 0;
            const float scale = unseen ? 0 : weight_scale[half];
            a *= scale;
            b *= scale;
          }
          const std::uint32_t rounded = H::pack(a, b);
          high[n][half] = transpose(rounded);
          low[n][half] = transpose(H::pack(a - H::low(rounded), b - H::high(rounded)));
        }
      }
      if (__any_sync(0xffffffffU, rescale)) {
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          if (n > 0 && n * kDecodeHeads >= columns) continue;
#pragma unroll
          for (int c = 0; c < kChannelTiles; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][c][i] *= factor[n][i % 2];
        }
      }
#pragma unroll
      for (int c = 0; c < kChannelTiles; ++c) {
        const std::uint32_t r[4] = {value.pair(0, c), value.pair(1, c), value.pair(2, c),
                                    value.pair(3, c)};
        const std::uint32_t a[4] = {
            __byte_perm(r[0], r[1], 0x5410), __byte_perm(r[0], r[1], 0x7632),
            __byte_perm(r[2], r[3], 0x5410), __byte_perm(r[2], r[3], 0x7632)};
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          if (n > 0 && n * kDecodeHeads >= columns) continue;
          H::multiply_add(out[n][c], a, high[n][0], high[n][1]);
          H::multiply_add(out[n][c], a, low[n][0], low[n][1]);
        }
      }
      if (another) load_values(next);
      here = next;
      more = another;
    }
    next_tile = tiles_end;
  }

  // Warps leave their parts in shared memory, 8 columns at a time; a cluster's blocks send theirs
  // to its first.
  const int busy = min(kWarps, max(1, end - begin));  // warps that may have had a tile
  const int part_columns = min(most_columns, kDecodeHeads);
  float* const parts = reinterpret_cast<float*>(working);  // [warps, part_columns, kPart]
  float2* const states = reinterpret_cast<float2*>(parts + kWarps * part_columns * kPart);
  float* const block_parts =  // [blocks of a cluster, columns, head_dim]
      reinterpret_cast<float*>(working + Memory::block_parts(most_columns));
  float2* const block_states =
      reinterpret_cast<float2*>(block_parts + cluster.size * columns * kHeadDim);
  const auto finish = [&](int column, int channel, float2 state, float4 total) {
    const int token = token_of(column);
    const std::int64_t head = head_of(column);
    const float sink = p.variant.sink.logit(head) * kLog2E;
    const float top = fmaxf(state.x, sink);
    float scale = 0;
    if (!(state.y == 0)) {
      const float weight = power_of_two(state.x - top);
      scale = weight / (state.y * weight + power_of_two(sink - top));
    }
    store_output(
        p.out, p.output_type,
        session * p.out_session_stride + token * p.out_token_stride + head * kHeadDim + channel,
        {total.x * scale, total.y * scale, total.z * scale, total.w * scale});
    if (p.lse != nullptr && channel == 0)
      p.lse[(session * p.max_queries + token) *
                (static_cast<std::int64_t>(gridDim.y / p.column_blocks) * p.group) +
            head] =
          state.y == 0 ? -kInfinity : (state.x + __log2f(state.y)) * 0.693147180559945309F;
  };
  const int active = max(1, (tiles + share - 1) / share);  // blocks that have a tile
  const bool alone = active <= cluster.size;               // no other cluster has a part
  const int blocks = min(cluster.size, active - (split - cluster.rank));
  const auto leave = [&](int column, int channel, float2 state, float4 total) {
    if (alone) {
      finish(column, channel, state, total);
    } else {
      const std::int64_t part = (unit * cluster.count + cluster.index) * kColumns + column;
      *reinterpret_cast<float4*>(p.partials + part * kHeadDim + channel) = total;
      if (channel == 0) p.states[part] = state;
    }
  };
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
    const int width = min(columns - n * kDecodeHeads, kDecodeHeads);
    if (width <= 0) continue;
    __syncthreads();  // what was in shared memory has been read
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float total = sum[n][i];
      total += __shfl_xor_sync(0xffffffffU, total, 4);
      total += __shfl_xor_sync(0xffffffffU, total, 8);
      total += __shfl_xor_sync(0xffffffffU, total, 16);
      const int column = 2 * t + i;
      if (warp >= busy || column >= width) continue;
      if (g == 0) states[warp * part_columns + column] = {maximum[n][i], total};
      float* const row = parts + (warp * part_columns + column) * kPart;
      constexpr int kPaired = kHeadDim / 64 * 4;  // registers whose channels come four in a row
#pragma unroll
      for (int c = 0; c < kPaired; c += 2)
        *reinterpret_cast<float4*>(row + ValueFragment<kHeadDim>::channel(c, g)) = {
            out[n][c][i], out[n][c][i + 2], out[n][c + 1][i], out[n][c + 1][i + 2]};
#pragma unroll
      for (int c = kPaired; c < kChannelTiles; ++c)
        *reinterpret_cast<float2*>(row + ValueFragment<kHeadDim>::channel(c, g)) = {
            out[n][c][i], out[n][c][i + 2]};
    }
    __syncthreads();
    if (n == 0 && cluster.size > 1) cluster_wait();  // the first block's barrier is made
#pragma unroll 1
    for (int e = tid; e < width * (kHeadDim / 4); e += kThreads) {
      const int column = e / (kHeadDim / 4);
      const int channel = e % (kHeadDim / 4) * 4;
      float4 total;
      const float2 state =
          merge_parts < kWarps == 12
              ? 6
              : 8 > (
                        busy, [&](int i) { return states[i * part_columns + column]; },
                        [&](int i) {
                          return *reinterpret_cast<const float4*>(
                              parts + (i * part_columns + column) * kPart + channel);
                        },
                        total);
      const int of_block = n * kDecodeHeads + column;
      if (blocks == 1) {
        leave(of_block, channel, state, total);
        continue;
      }
      const int row = cluster.rank * columns + of_block;
      float4* const part = reinterpret_cast<float4*>(block_parts + row * kHeadDim + channel);
      if (cluster.rank == 0) {
        *part = total;
        if (channel == 0) block_states[row] = state;
      } else {
        send_to_first_block(part, total, &arrived);
        if (channel == 0) send_to_first_block(block_states + row, state, &arrived);
      }
    }
  }
  if (blocks > 1) {
    if (cluster.rank != 0) return;
    if (tid == 0)
      byte_barrier_expect(&arrived, (blocks - 1) * columns *
                                        (kHeadDim * static_cast<int>(sizeof(float)) +
                                         static_cast<int>(sizeof(float2))));
    __syncthreads();
    byte_barrier_wait(&arrived);
#pragma unroll 1
    for (int e = tid; e < columns * (kHeadDim / 4); e += kThreads) {
      const int column = e / (kHeadDim / 4);
      const int channel = e % (kHeadDim / 4) * 4;
      float4 total;
      const float2 state = merge_parts<8>(
          blocks, [&](int i) { return block_states[i * columns + column]; },
          [&](int i) {
            return *reinterpret_cast<const float4*>(block_parts +
                                                    (i * columns + column) * kHeadDim + channel);
          },
          total);
      leave(column, channel, state, total);
    }
  }
  if (alone) return;

  // The cluster that arrives last merges all; it leaves the counter as it found it.
  const int active_clusters = (active + cluster.size - 1) / cluster.size;
  __syncthreads();
  if (tid == 0) {
    const bool last = arrive(p.arrivals + unit) == active_clusters - 1;
    if (last) p.arrivals[unit] = 0;
    last_block = last ? 1 : 0;
  }
  __syncthreads();
  if (last_block == 0) return;
#pragma unroll 1
  for (int e = tid; e < columns * (kHeadDim / 4); e += kThreads) {
    const int column = e / (kHeadDim / 4);
    const int channel = e % (kHeadDim / 4) * 4;
    const std::int64_t first = unit * cluster.count * kColumns + column;
    float4 total;
    const float2 state = merge_parts<8>(
        active_clusters, [&](int i) { return __ldcg(p.states + first + i * kColumns); },
        [&](int i) {
          return __ldcg(reinterpret_cast<const float4*>(
              p.partials + (first + i * kColumns) * kHeadDim + channel));
        },
        total);
    finish(column, channel, state, total);
  }
}

}  // namespace detail

/// How launches are cut: `splits` blocks per KV head and session; `cluster` of them, a divisor,
/// merge through shared memory (sm_90). No result's meaning depends on it.
struct SegmentSchedule {
  int splits = 0;
  int cluster = 0;

  friend bool operator==(const SegmentSchedule&, const SegmentSchedule&) = default;
};

/// Scratch and schedule of segment attention for one shape; layers share it. Only construction
/// allocates. Computes what attend() (attention/attend.hpp) says: out = sum softmax(score)_j v_j
/// and lse = ln sum e^score over the visible keys of all segments; a row that sees nothing gives 0
/// and -infinity. Queries and probabilities carry 16 bits (22 for f16).
///
/// kColumnTiles: heads times queries that a block takes on, in eights. 1 for single queries; 2
/// reads rows half as often where there are more than 8 (head sizes up to 128: registers).
template <class Element, int kHeadDim, class Variant = device::AttentionVariant<>,
          int kColumnTiles = 1>
class SegmentAttentionPlan {
  static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, f16> ||
                    std::is_same_v<Element, fp8_e4m3> || std::is_same_v<Element, std::int8_t>,
                "segments hold bf16, f16, fp8_e4m3 or int8_t");
  static_assert(kHeadDim == 64 || kHeadDim == 80 || kHeadDim == 96 || kHeadDim == 128 ||
                    kHeadDim == 256,
                "head sizes 64, 80, 96, 128 and 256 are built");
  static_assert(kColumnTiles >= 1 && kColumnTiles * kHeadDim <= 256, "too many registers");

 public:
  /// schedule: left out, choose()'s; without a cluster, the largest that divides its splits.
  /// \throws Error(kShape) when extents do not fit; Error(kDevice).
  SegmentAttentionPlan(const SegmentAttentionShape& shape, const SegmentRotation& rotation,
                       SegmentSchedule schedule = {})
      : shape_(shape), attention_factor_(static_cast<float>(rotation.attention_factor)) {
    const auto require = [](bool good, const char* field, const std::string& expected,
                            std::int64_t found) {
      if (!good)
        throw Error(ErrorCode::kShape, {"segment attention does not fit", "SegmentAttentionShape",
                                        field, expected, std::to_string(found)});
    };
    require(shape.num_kv_heads >= 1, "num_kv_heads", "at least 1", shape.num_kv_heads);
    require(shape.num_qo_heads >= 1 && shape.num_qo_heads % shape.num_kv_heads == 0, "num_qo_heads",
            "a multiple of num_kv_heads", shape.num_qo_heads);
    require(shape.batch_size >= 1 && shape.batch_size <= 65535, "batch_size", "1 to 65535",
            shape.batch_size);
    require(shape.max_queries >= 1 && shape.max_queries <= detail::kMaxSegmentQueries,
            "max_queries", "1 to " + std::to_string(detail::kMaxSegmentQueries), shape.max_queries);
    require(shape.max_segments >= 1 && shape.max_segments <= detail::kMaxListSegments,
            "max_segments", "1 to " + std::to_string(detail::kMaxListSegments), shape.max_segments);
    require(static_cast<int>(rotation.frequencies.size()) <= kHeadDim / 2, "frequencies",
            "at most " + std::to_string(kHeadDim / 2),
            static_cast<std::int64_t>(rotation.frequencies.size()));
    const auto kv_heads = static_cast<std::size_t>(shape.num_kv_heads);
    std::vector<std::int32_t> classes(kv_heads, shape.head_classes.empty() ? 0 : -1);
    std::vector<std::int32_t> rows(kv_heads);
    for (std::size_t h = 0; h < kv_heads; ++h) rows[h] = static_cast<std::int32_t>(h);
    for (std::size_t c = 0; c < shape.head_classes.size(); ++c)
      for (std::size_t j = 0; j < shape.head_classes[c].size(); ++j) {
        const std::int32_t head = shape.head_classes[c][j];
        require(
            head >= 0 && head < shape.num_kv_heads && classes[static_cast<std::size_t>(head)] < 0,
            "head_classes", "each KV head once", head);
        classes[static_cast<std::size_t>(head)] = static_cast<std::int32_t>(c);
        rows[static_cast<std::size_t>(head)] = static_cast<std::int32_t>(j);
      }
    for (std::size_t h = 0; h < kv_heads; ++h)
      require(classes[h] >= 0, "head_classes", "each KV head once", static_cast<std::int64_t>(h));

    group_ = static_cast<int>(shape.num_qo_heads / shape.num_kv_heads);
    column_blocks_ = static_cast<int>((group_ * shape.max_queries + kColumns - 1) / kColumns);
    const std::int64_t units = shape.batch_size * shape.num_kv_heads * column_blocks_;
    int device = 0;
    int multiprocessors = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
    check_cuda(cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, device),
               "cudaDeviceGetAttribute");
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, kernel_), "cudaFuncGetAttributes");
    int most_shared = 0;
    check_cuda(
        cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
    most_shared -= static_cast<int>(attributes.sharedSizeBytes);
    check_cuda(
        cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared),
        "cudaFuncSetAttribute");
    schedule_ = schedule;
    if (schedule.splits == 0) {
      schedule_ = choose(units, shape.max_keys, multiprocessors);
    } else if (schedule.cluster == 0) {
      schedule_.cluster = kMostCluster;
      while (schedule_.splits % schedule_.cluster != 0) schedule_.cluster /= 2;
    }
    require(schedule_.splits >= 1 && schedule_.splits <= kMostSplits, "schedule.splits",
            "1 to " + std::to_string(kMostSplits), schedule_.splits);
    require(schedule_.cluster >= 1 && schedule_.cluster <= kMostCluster &&
                schedule_.splits % schedule_.cluster == 0,
            "schedule.cluster",
            "a divisor of schedule.splits, at most " + std::to_string(kMostCluster),
            schedule_.cluster);
    if (major_ < 9) schedule_.cluster = 1;
    require(shared_bytes() <= most_shared, "max_segments",
            "a list that fits into the shared memory of a block", shape.max_segments);
    head_class_ = Buffer<std::int32_t, cuda>(std::span<const std::int32_t>(classes));
    head_row_ = Buffer<std::int32_t, cuda>(std::span<const std::int32_t>(rows));
    const auto parts =
        static_cast<std::size_t>(units * (schedule_.splits / schedule_.cluster) * kColumns);
    partials_ = Buffer<float, cuda>(parts * kHeadDim);
    states_ = Buffer<float2, cuda>(parts);
    arrivals_ = Buffer<int, cuda>(static_cast<std::size_t>(units));
    std::vector<detail::TurnFrequency> turns;
    for (const double frequency : rotation.frequencies) {
      const long double exact =
          static_cast<long double>(frequency) / (2 * std::numbers::pi_v<long double>);
      const auto high = static_cast<double>(exact);
      turns.push_back({high, static_cast<double>(exact - static_cast<long double>(high))});
    }
    interleaved_ = rotation.interleaved;
    frequencies_ =
        Buffer<detail::TurnFrequency, cuda>(std::span<const detail::TurnFrequency>(turns));
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // buffers are zero
  }

  const SegmentAttentionShape& shape() const { return shape_; }
  const SegmentSchedule& schedule() const { return schedule_; }

  /// The schedule for `units` KV heads (times sessions), as measured on an H100: a block on every
  /// multiprocessor, as far as powers of two go, in pairs. But clusters of more than two find no
  /// room on all of a chip whose parts are no multiples of them; where warps go round three times
  /// at most, half the blocks in clusters are faster. No block has less than 4 tiles.
  static SegmentSchedule choose(std::int64_t units, std::int64_t max_keys, int multiprocessors) {
    const std::int64_t tiles = (max_keys + detail::kDecodeTile - 1) / detail::kDecodeTile;
    int splits = 1;
    while (splits < 64 && 2 * splits * units <= multiprocessors &&
           2 * splits * detail::kLeastTiles <= tiles)
      splits *= 2;
    if (2 * splits * units <= multiprocessors) return {splits, std::min(splits, kMostCluster)};
    if (splits > 2 && 2 * tiles <= std::int64_t{3} * splits * Memory::kWarps)
      return {splits / 2, std::min(splits / 2, kMostCluster)};
    return {splits, std::min(splits, 2)};
  }

  /// One layer's attention. May be captured: lists, prefixes and readers are read when it runs.
  /// Preconditions: `lists` was made for the same shape; alignment as Segment says, lists, queries
  /// and outputs aligned to 16 bytes. overlap: the launch may start before the kernel before it in
  /// the stream has ended (programmatic dependent launch, sm_90 and later); it waits for that
  /// kernel's writes before it reads anything but what the plan's constructor wrote.
  /// \throws Error(kDevice) if the launch is refused.
  void launch(const SegmentListsView<Element>& lists, const SegmentAttentionTensors& x,
              const Variant& variant, cudaStream_t stream, bool overlap = false) const {
    const detail::SegmentAttentionParams<Element, Variant> params{
        .segments = lists.segments,
        .counts = lists.counts,
        .readers = lists.readers,
        .head_class = head_class_.data(),
        .head_row = head_row_.data(),
        .frequencies = frequencies_.data(),
        .query = x.query,
        .out = x.out,
        .lse = x.lse,
        .partials = const_cast<float*>(partials_.data()),
        .states = const_cast<float2*>(states_.data()),
        .arrivals = const_cast<int*>(arrivals_.data()),
        .query_session_stride = x.query_session_stride,
        .query_token_stride = x.query_token_stride,
        .out_session_stride = x.out_session_stride,
        .out_token_stride = x.out_token_stride,
        .attention_factor = attention_factor_,
        .classes = static_cast<int>(shape_.num_classes()),
        .max_segments = static_cast<int>(shape_.max_segments),
        .max_queries = static_cast<int>(shape_.max_queries),
        .group = group_,
        .group_inverse = inverse(32, group_),
        .splits_inverse = inverse(36, schedule_.splits),
        .column_blocks = column_blocks_,
        .num_pairs = static_cast<int>(frequencies_.size()),
        .interleaved = interleaved_,
        .input_type = x.input_type,
        .output_type = x.output_type,
        .variant = variant};
    const Launch launch(*this, stream, overlap);
    check_cuda(cudaLaunchKernelEx(&launch.config, kernel_, params), "segment_attention_kernel");
  }

 private:
  /// 2^bits / divisor, rounded up: n * it >> bits is n / divisor while their product is below
  /// 2^bits.
  static std::uint64_t inverse(int bits, int divisor) {
    const auto by = static_cast<std::uint64_t>(divisor);
    return ((std::uint64_t{1} << bits) + by - 1) / by;
  }

  using Memory = detail::SegmentMemory<kHeadDim, kColumnTiles>;
  static constexpr int kColumns = Memory::kColumns;
  static constexpr int kMostSplits = 512;
  static constexpr int kMostCluster = 8;  // what every chip with clusters offers

  struct Launch {
    Launch(const SegmentAttentionPlan& plan, cudaStream_t stream, bool overlap) {
      config.gridDim = dim3(static_cast<unsigned>(plan.schedule_.splits),
                            static_cast<unsigned>(plan.shape_.num_kv_heads * plan.column_blocks_),
                            static_cast<unsigned>(plan.shape_.batch_size));
      config.blockDim = dim3(Memory::kWarps * detail::kWarpSize);
      config.dynamicSmemBytes = static_cast<std::size_t>(plan.shared_bytes());
      config.stream = stream;
      config.attrs = attributes;
      if (overlap && plan.major_ >= 9) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
      }
      if (plan.schedule_.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x =
            static_cast<unsigned>(plan.schedule_.cluster);
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs++].val.clusterDim.z = 1;
      }
    }
    Launch(const Launch&) = delete;  // config points into it
    Launch& operator=(const Launch&) = delete;

    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config{};
  };

  int shared_bytes() const {
    return Memory::bytes(
        static_cast<int>(shape_.max_segments),
        static_cast<int>(std::min<std::int64_t>(kColumns, group_ * shape_.max_queries)),
        schedule_.cluster);
  }

  // What the attribute is set on (backend.cuh).
  void (*kernel_)(detail::SegmentAttentionParams<Element, Variant>) =
      detail::segment_attention_kernel<Element, kHeadDim, kColumnTiles, Variant>;
  SegmentAttentionShape shape_;
  float attention_factor_;
  bool interleaved_ = false;
  int group_ = 1;
  int column_blocks_ = 1;
  int major_ = 0;
  SegmentSchedule schedule_;
  Buffer<std::int32_t, cuda> head_class_;
  Buffer<std::int32_t, cuda> head_row_;
  Buffer<detail::TurnFrequency, cuda> frequencies_;
  Buffer<float, cuda> partials_;
  Buffer<float2, cuda> states_;
  Buffer<int, cuda> arrivals_;
};

}  // namespace sluice
