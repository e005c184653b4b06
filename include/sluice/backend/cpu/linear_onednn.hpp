// SPDX-License-Identifier: MIT
/// Products of chunks of tokens with weights through oneDNN, in programs that are compiled with
/// SLUICE_ONEDNN: it multiplies bf16 by bf16 with AMX tiles where the processor has them, which
/// nothing else here does, and with AVX512_BF16 where that is all. oneDNN 2.6 or a later 2.x; its
/// names occur in this header alone, which is empty without SLUICE_ONEDNN.
#pragma once

#if SLUICE_ONEDNN

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <oneapi/dnnl/dnnl.h>
#include <oneapi/dnnl/dnnl_config.h>
#include <oneapi/dnnl/dnnl_version.h>

#if DNNL_VERSION_MAJOR != 2
#error "SLUICE_ONEDNN needs oneDNN 2.6 or a later 2.x: the C interface of 3.x is another one"
#endif
#if DNNL_CPU_THREADING_RUNTIME == DNNL_RUNTIME_OMP
#include <omp.h>
#elif DNNL_CPU_THREADING_RUNTIME != DNNL_RUNTIME_SEQ
#error "SLUICE_ONEDNN needs an oneDNN whose threads are OpenMP's, or one without threads"
#endif

#include "sluice/core/config.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"

namespace sluice::detail {

/// What oneDNN multiplies, one tile of rows at a time: sums[t, r] = sum over c of x[t, c] w[r, c]
/// for `x` and `w` of bf16, up to kMostTokens tokens and exactly kRows rows, in float32.
///
/// Products of bf16 are exact in float32; their sums are float32, in an order that is oneDNN's own:
/// a function of the columns, of the blocks that the tokens are cut into (below) and of the
/// processor. So a token's sums may differ by that rounding from chunk to chunk, but not with the
/// team's size. AMX takes operands below 2^-126 as zero, and so flushes sums.
///
/// oneDNN runs each product on the thread that asks for it and starts no threads: products are made
/// while OpenMP's number of threads is set to one on the constructing thread (it is set back). They
/// are all made at construction: tokens in blocks of 32, 64, 128, 256 and 512, of which a chunk,
/// padded with zeros to a multiple of 32, takes the largest that fit, for each number of columns.
///
/// One thing breaks the rule that nothing is allocated after construction: executing a product,
/// oneDNN 2.6 takes six small blocks from the C library and gives them back before it returns (a
/// map of its arguments). They are for chunks of kFewestTokens tokens and more alone. A thread
/// finds them in its own cache of free blocks (measured with the GNU C library: six in each of
/// thousands of products, no more).
class OneDnnProducts {
 public:
  /// Rows of a tile.
  static constexpr std::int64_t kRows = 64;
  /// Tokens from which products come here, and of which blocks are multiples.
  static constexpr std::int64_t kFewestTokens = 32;
  static constexpr std::int64_t kMostTokens = 512;

  /// Whether oneDNN multiplies bf16 in tiles here (AMX): as far as is known from processors with
  /// AVX512_BF16, what is in linear_bf16.hpp and linear_int8.hpp is as fast or faster elsewhere.
  /// oneDNN's own variable DNNL_MAX_CPU_ISA=AVX512_CORE_BF16 makes it no.
  static bool has_tiles() {
    constexpr unsigned kTiles = dnnl_cpu_isa_avx512_core_amx;
    return (static_cast<unsigned>(dnnl_get_effective_cpu_isa()) & kTiles) == kTiles;
  }
  /// Whether it multiplies bf16 by instructions made for that, in tiles or in pairs.
  static bool has_pairs() {
    constexpr unsigned kPairs = dnnl_cpu_isa_avx512_core_bf16;
    return (static_cast<unsigned>(dnnl_get_effective_cpu_isa()) & kPairs) == kPairs;
  }

  /// For matrices of the numbers of columns `cols`, chunks of up to `max_tokens` tokens and
  /// `team_size` members. Allocates; takes about a millisecond for each number of columns, and some
  /// more once in a program. \throws Error(kUnsupported) where has_pairs() is false or oneDNN
  /// refuses.
  OneDnnProducts(std::span<const std::int64_t> cols, std::int64_t max_tokens, int team_size)
      : max_tokens_(padded(std::min(max_tokens, kMostTokens))), cols_(cols.begin(), cols.end()) {
    if (!has_pairs())
      throw Error(ErrorCode::kUnsupported, {"no products of bf16 here", "oneDNN", "processor",
                                            "AVX512_BF16 or AMX", "neither"});
    const SingleThread single;
    dnnl_engine_t engine = nullptr;
    check(dnnl_engine_create(&engine, dnnl_cpu, 0), "engine");
    engine_.reset(engine);
    std::ranges::sort(cols_);
    cols_.erase(std::unique(cols_.begin(), cols_.end()), cols_.end());
    std::size_t scratch = 0;
    for (const std::int64_t count : cols_)
      for (std::int64_t tokens = kFewestTokens; tokens <= max_tokens_; tokens *= 2) {
        products_.push_back(make(count, tokens));
        scratch = std::max(scratch, dnnl_memory_desc_get_size(&products_.back().scratch));
      }
    sizes_ = cols_.empty() ? 0 : products_.size() / cols_.size();

    const auto widest = static_cast<std::size_t>(cols_.empty() ? 0 : cols_.back());
    tokens_ = Buffer<bf16>(static_cast<std::size_t>(max_tokens_) * widest);
    for (int index = 0; index < team_size; ++index) members_.push_back(member(widest, scratch));
    // What the first execution of each sets up, and whether it works, is not left to a step.
    for (std::size_t width = 0; width < cols_.size(); ++width)
      for (std::size_t size = 0; size < sizes_; ++size)
        for (Member& each : members_)
          check(execute(each, width, size, each.rows.data(), 0), "execution");
  }

  /// The number by which multiply() knows matrices of `cols` columns, or -1.
  int width_of(std::int64_t cols) const {
    const auto place = std::ranges::find(cols_, cols);
    return place == cols_.end() ? -1 : static_cast<int>(place - cols_.begin());
  }
  /// Tokens of one call of multiply(), at most.
  std::int64_t max_tokens() const { return max_tokens_; }
  /// The tokens that multiply() takes, one row of the matrix's columns behind the other, up to
  /// padded(count) of them. Shared by all members. [max_tokens, cols]
  bf16* tokens() { return tokens_.data(); }
  /// Room for a tile of rows in bf16, a member's own. [kRows, cols]
  bf16* rows(int member) { return members_[static_cast<std::size_t>(member)].rows.data(); }
  /// What multiply() wrote. [tokens, kRows]
  const float* sums(int member) const {
    return members_[static_cast<std::size_t>(member)].sums.data();
  }
  /// `count` tokens and those of zeros behind them.
  static constexpr std::int64_t padded(std::int64_t count) {
    return (count + kFewestTokens - 1) / kFewestTokens * kFewestTokens;
  }
  /// Bytes held here; oneDNN's code for a product is some tens of kilobytes more.
  std::size_t bytes() const {
    std::size_t sum = tokens_.bytes();
    for (const Member& each : members_)
      sum += each.rows.bytes() + each.sums.bytes() + each.scratch.bytes();
    return sum;
  }

  /// The first padded(count) of tokens() times kRows rows of bf16, [kRows, cols] at `rows`, into
  /// sums(). Members may call it side by side.
  void multiply(int member, int width, const void* rows, std::int64_t count) {
    Member& own = members_[static_cast<std::size_t>(member)];
    for (std::int64_t first = 0, left = padded(count); left > 0;) {
      const auto size =
          std::min<std::size_t>(sizes_, static_cast<std::size_t>(std::bit_width(
                                            static_cast<std::uint64_t>(left / kFewestTokens)))) -
          1;
      [[maybe_unused]] const dnnl_status_t status =
          execute(own, static_cast<std::size_t>(width), size, rows, first);
      SLUICE_ASSERT(status == dnnl_success);
      first += kFewestTokens << size;
      left -= kFewestTokens << size;
    }
  }

 private:
  template <auto kDestroy>
  struct Destroy {
    template <class Object>
    void operator()(Object* object) const noexcept {
      kDestroy(object);
    }
  };
  using Engine = std::unique_ptr<dnnl_engine, Destroy<dnnl_engine_destroy>>;
  using Stream = std::unique_ptr<dnnl_stream, Destroy<dnnl_stream_destroy>>;
  using Memory = std::unique_ptr<dnnl_memory, Destroy<dnnl_memory_destroy>>;
  using Primitive = std::unique_ptr<dnnl_primitive, Destroy<dnnl_primitive_destroy>>;
  using Description = std::unique_ptr<dnnl_primitive_desc, Destroy<dnnl_primitive_desc_destroy>>;
  using Attributes = std::unique_ptr<dnnl_primitive_attr, Destroy<dnnl_primitive_attr_destroy>>;

  struct Product {
    std::int64_t cols;
    dnnl_memory_desc_t source, weights, sums, scratch;
    Primitive primitive;
  };
  // One member's memory and oneDNN's handles of it, of each product four.
  struct Handles {
    Memory source, weights, sums, scratch;
  };
  struct Member {
    Buffer<bf16> rows;
    Buffer<float> sums;
    Buffer<std::byte> scratch;
    Stream stream;
    std::vector<Handles> handles;
  };

  class SingleThread {
   public:
#if DNNL_CPU_THREADING_RUNTIME == DNNL_RUNTIME_OMP
    SingleThread() : before_(omp_get_max_threads()) {
      omp_set_num_threads(1);
    }
    ~SingleThread() {
      omp_set_num_threads(before_);
    }

   private:
    int before_;
#else
    SingleThread() {}
    ~SingleThread() {}
#endif
    SingleThread(const SingleThread&) = delete;
    SingleThread& operator=(const SingleThread&) = delete;
  };

  static void check(dnnl_status_t status, const char* field) {
    if (status != dnnl_success)
      throw Error(ErrorCode::kUnsupported, {"oneDNN refuses", "oneDNN", field, "status 0",
                                            "status " + std::to_string(static_cast<int>(status))});
  }

  static dnnl_memory_desc_t describe(dnnl_data_type_t type, std::int64_t rows, std::int64_t cols,
                                     std::int64_t row_stride, std::int64_t col_stride) {
    dnnl_memory_desc_t description;
    const dnnl_dims_t extents = {rows, cols};
    const dnnl_dims_t strides = {row_stride, col_stride};
    check(dnnl_memory_desc_init_by_strides(&description, 2, extents, type, strides), "layout");
    return description;
  }

  Product make(std::int64_t cols, std::int64_t tokens) const {
    Product product{.cols = cols,
                    .source = describe(dnnl_bf16, tokens, cols, cols, 1),
                    .weights = describe(dnnl_bf16, cols, kRows, 1, cols),
                    .sums = describe(dnnl_f32, tokens, kRows, kRows, 1),
                    .scratch = {},
                    .primitive = {}};
    dnnl_matmul_desc_t operation;
    check(dnnl_matmul_desc_init(&operation, &product.source, &product.weights, nullptr,
                                &product.sums),
          "product");
    dnnl_primitive_attr_t attributes = nullptr;
    check(dnnl_primitive_attr_create(&attributes), "attributes");
    const Attributes attributes_owner(attributes);
    check(dnnl_primitive_attr_set_scratchpad_mode(attributes, dnnl_scratchpad_mode_user),
          "attributes");
    dnnl_primitive_desc_t description = nullptr;
    check(dnnl_primitive_desc_create(&description, &operation, attributes, engine_.get(), nullptr),
          "product");
    const Description description_owner(description);
    // Its other implementations take threads and memory of their own while they run.
    const char* name = nullptr;
    check(dnnl_primitive_desc_query(description, dnnl_query_impl_info_str, 0, &name), "product");
    if (!std::string_view(name).starts_with("brg"))
      throw Error(ErrorCode::kUnsupported, {"another implementation than expected", "oneDNN",
                                            "product", "brg...", std::string(name)});
    product.scratch = *dnnl_primitive_desc_query_md(description, dnnl_query_scratchpad_md, 0);
    dnnl_primitive_t primitive = nullptr;
    check(dnnl_primitive_create(&primitive, description), "product");
    product.primitive.reset(primitive);
    return product;
  }

  Memory memory(const dnnl_memory_desc_t& description, void* data) const {
    dnnl_memory_t created = nullptr;
    check(dnnl_memory_create(&created, &description, engine_.get(), data), "memory");
    return Memory(created);
  }

  Member member(std::size_t widest, std::size_t scratch) {
    Member result{.rows = Buffer<bf16>(static_cast<std::size_t>(kRows) * widest),
                  .sums = Buffer<float>(static_cast<std::size_t>(max_tokens_ * kRows)),
                  .scratch = Buffer<std::byte>(std::max<std::size_t>(scratch, 1)),
                  .stream = {},
                  .handles = {}};
    dnnl_stream_t stream = nullptr;
    check(dnnl_stream_create(&stream, engine_.get(), dnnl_stream_in_order), "stream");
    result.stream.reset(stream);
    for (const Product& product : products_)
      result.handles.push_back({.source = memory(product.source, tokens_.data()),
                                .weights = memory(product.weights, result.rows.data()),
                                .sums = memory(product.sums, result.sums.data()),
                                .scratch = memory(product.scratch, result.scratch.data())});
    return result;
  }

  // The block of tokens that begins with `first`.
  dnnl_status_t execute(Member& own, std::size_t width, std::size_t size, const void* rows,
                        std::int64_t first) {
    const std::size_t index = width * sizes_ + size;
    const Product& product = products_[index];
    const Handles& handles = own.handles[index];
    // oneDNN reads the weights, which its handles cannot say.
    if (const auto status =
            dnnl_memory_set_data_handle(handles.weights.get(), const_cast<void*>(rows));
        status != dnnl_success)
      return status;
    if (const auto status = dnnl_memory_set_data_handle(handles.source.get(),
                                                        tokens_.data() + first * product.cols);
        status != dnnl_success)
      return status;
    if (const auto status =
            dnnl_memory_set_data_handle(handles.sums.get(), own.sums.data() + first * kRows);
        status != dnnl_success)
      return status;
    const dnnl_exec_arg_t arguments[] = {{DNNL_ARG_SRC, handles.source.get()},
                                         {DNNL_ARG_WEIGHTS, handles.weights.get()},
                                         {DNNL_ARG_DST, handles.sums.get()},
                                         {DNNL_ARG_SCRATCHPAD, handles.scratch.get()}};
    if (const auto status =
            dnnl_primitive_execute(product.primitive.get(), own.stream.get(),
                                   static_cast<int>(std::size(arguments)), arguments);
        status != dnnl_success)
      return status;
    return dnnl_stream_wait(own.stream.get());
  }

  std::int64_t max_tokens_;
  std::vector<std::int64_t> cols_;  // ascending
  std::size_t sizes_ = 0;           // products for each number of columns
  Engine engine_;
  std::vector<Product> products_;  // [cols_, sizes_]
  Buffer<bf16> tokens_;
  std::vector<Member> members_;
};

}  // namespace sluice::detail

#endif
