// Rows in lanes: see LaneTiles.
#pragma once

#include "../common/transpose.h"
#include "call.h"

namespace kdkernels::temperature_kl {

// Processes the layout in which rows are adjacent, and rows of few classes in any layout, one vector
// of rows at a time. Each vector is copied to a tile [class][lane] first: the classes of a map can be
// a power of two apart in memory, where they would evict one another from the cache. Several vectors
// are copied at once, so that each copy moves a whole run of a class.
template <typename T>
class LaneTiles {
 public:
  static constexpr int lanes = simd::kLanes<T>;

  LaneTiles(const Call<T>& call, const Rows& layout)
      : call_(call),
        layout_(layout),
        tile_size_(call.classes * lanes),
        chunk_rows_(lanes * std::clamp<int64_t>((int64_t(16) << 10) / (call.classes * simd::kBytes), 1, 8)),
        chunks_per_run_((layout.run() + chunk_rows_ - 1) / chunk_rows_) {}

  int64_t count() const { return call_.rows / layout_.run() * chunks_per_run_; }
  int64_t logits_per_chunk() const { return chunk_rows_ * call_.classes; }

  // The working memory of a thread: that of a tile, and copies of the logits of a chunk, which are
  // initialised because lanes past the end of a run are read.
  struct Memory {
    Scratch<T> scratch;
    std::unique_ptr<T[]> copies;
  };
  Memory make_memory() const { return {Scratch<T>(tile_size_), std::unique_ptr<T[]>(new T[kOperands * logits_per_chunk()]())}; }

  // Processes chunks [begin, end).
  void run(Memory& memory, int64_t begin, int64_t end) const {
    auto& [scratch, copies] = memory;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / chunks_per_run_ * layout_.run() + i % chunks_per_run_ * chunk_rows_;
      const int64_t count = std::min(chunk_rows_, layout_.run() - i % chunks_per_run_ * chunk_rows_);
      const auto offset = layout_.offsets(first);
      for (int k : {kStudent, kTeacher}) copy_rows<true>(k, offset[k], count, operand_copy(copies, k));
      for (int64_t v = 0; v * lanes < count; ++v)
        run_vector(copies, v, first + v * lanes, std::min<int64_t>(lanes, count - v * lanes), scratch);
      for (int k : {kStudentGrad, kTeacherGrad})
        if (call_.is_wanted(Operand(k))) copy_rows<false>(k, offset[k], count, operand_copy(copies, k));
    }
  }

 private:
  T* operand_copy(const std::unique_ptr<T[]>& copies, int k) const { return copies.get() + k * logits_per_chunk(); }

  // Copies `count` adjacent rows into tiles (`in`) or out of them.
  template <bool in>
  void copy_rows(int k, int64_t offset, int64_t count, T* tiles) const {
    const at::Tensor& x = call_.x[k];
    auto copy_typed = [&](auto* memory) {
      memory += offset;
      const int64_t stride = x.stride(call_.options.dim), step = layout_.step(k), whole_vectors = step == 1 ? count / lanes : 0;
      int64_t first_row = whole_vectors * lanes;
      using Stored = std::remove_pointer_t<decltype(memory)>;
      if constexpr (std::is_same_v<Stored, T> || std::is_same_v<T, float>)
        for (; stride == 1 && step != 1 && call_.classes >= lanes && first_row + lanes <= count; first_row += lanes)
          transpose_rows<in>(memory + first_row * step, step, tiles + first_row / lanes * tile_size_);
      for (int64_t j = 0; j < call_.classes; ++j, memory += stride) {
        for (int64_t v = 0; v < whole_vectors; ++v) {
          if constexpr (in)
            convert(memory + v * lanes, tiles + v * tile_size_ + j * lanes, lanes);
          else
            convert(tiles + v * tile_size_ + j * lanes, memory + v * lanes, lanes);
        }
        for (int64_t row = first_row; row < count; ++row) {
          T& number = tiles[row / lanes * tile_size_ + j * lanes + row % lanes];
          auto& stored = memory[row * step];
          if constexpr (in)
            number = static_cast<T>(stored);
          else
            stored = static_cast<std::remove_reference_t<decltype(stored)>>(number);
        }
      }
    };
    if (call_.element_types[k] == ElementType::native) return copy_typed(static_cast<T*>(address(x)));
    if (call_.element_types[k] == ElementType::bfloat16) return copy_typed(static_cast<c10::BFloat16*>(address(x)));
    if (call_.element_types[k] == ElementType::half) return copy_typed(static_cast<c10::Half*>(address(x)));
  }

  // Copies kLanes rows whose classes are adjacent. The last block of classes overlaps the one before.
  template <bool in, typename Stored>
  void transpose_rows(Stored* rows, int64_t step, T* tile) const {
    for (int64_t begin = 0; begin < call_.classes; begin += lanes) {
      const int64_t j = std::min(begin, call_.classes - lanes);
      Vec<T> block[lanes];
      for (int i = 0; i < lanes; ++i) {
        if constexpr (!in)
          block[i] = simd::load<T>(tile + (j + i) * lanes);
        else if constexpr (std::is_same_v<T, Stored>)
          block[i] = simd::load<T>(rows + i * step + j);
        else
          block[i] = widen(rows + i * step + j);
      }
      simd::transpose<T>(block);
      for (int i = 0; i < lanes; ++i) {
        if constexpr (in)
          simd::store<T>(tile + (j + i) * lanes, block[i]);
        else if constexpr (std::is_same_v<T, Stored>)
          simd::store<T>(rows + i * step + j, block[i]);
        else
          narrow(block[i], rows + i * step + j);
      }
    }
  }

  void run_vector(const std::unique_ptr<T[]>& copies, int64_t v, int64_t row, int valid_count, Scratch<T>& scratch) const {
    std::array<T*, kOperands> tiles;
    for (int k = 0; k < kOperands; ++k) tiles[k] = operand_copy(copies, k) + v * tile_size_;
    Vec<T> temperature = splat<T>(call_.row_temperature(row)), weight = splat<T>(call_.row_weight(row));
    for (int l = 0; l < valid_count && (call_.temperature || call_.upstream); ++l) {
      temperature[l] = call_.row_temperature(row + l);
      weight[l] = call_.row_weight(row + l);
    }
    // Set the logits of masked rows to zero in both networks, so that not even a NaN in them
    // reaches a result. Their results are set to zero below.
    for (int l = 0; l < valid_count && call_.mask; ++l)
      if (!call_.is_included(row + l)) clear_lane(tiles[kStudent], l), clear_lane(tiles[kTeacher], l);
    const Source<T> student(tiles[kStudent], tile_size_), teacher(tiles[kTeacher], tile_size_);
    const Sink<T> student_sink(tiles[kStudentGrad], ElementType::native, tile_size_, false),
        teacher_sink(tiles[kTeacherGrad], ElementType::native, tile_size_, false);
    const auto result =
        run_tile<T, PerLane>(call_, student, teacher, temperature, weight, call_.is_wanted(kStudentGrad) ? &student_sink : nullptr,
                             call_.is_wanted(kTeacherGrad) ? &teacher_sink : nullptr, scratch);
    for (int l = 0; l < valid_count; ++l) {
      const bool included = call_.is_included(row + l);
      if (call_.row_loss) call_.row_loss[row + l] = included ? result.value[l] : T(0);
      if (call_.temperature_grad) call_.temperature_grad[row + l] = included ? result.temperature_derivative[l] : T(0);
      if (!included) clear_lane(tiles[kStudentGrad], l), clear_lane(tiles[kTeacherGrad], l);
    }
    if (call_.row_scale) scale_rows(tiles[kStudentGrad], call_.row_scale + row, valid_count);
  }

  // Divides each row of a gradient by a power of two and stores the powers in row_scale.
  void scale_rows(T* tile, float* row_scale, int valid_count) const {
    Vec<T> largest{}, inverse{};
    for (int64_t j = 0; j < call_.classes; ++j) {
      const Vec<T> g = simd::load<T>(tile + j * lanes);
      largest = simd::max(g < T(0) ? -g : g, largest);
    }
    for (int l = 0; l < valid_count; ++l) {
      row_scale[l] = saved_row_scale(largest[l]);
      inverse[l] = T(1) / row_scale[l];
    }
    for (int64_t j = 0; j < call_.classes; ++j) simd::store<T>(tile + j * lanes, simd::load<T>(tile + j * lanes) * inverse);
  }

  void clear_lane(T* tile, int lane) const {
    for (int64_t j = 0; j < call_.classes; ++j) tile[j * lanes + lane] = 0;
  }

  const Call<T>& call_;
  const Rows& layout_;
  int64_t tile_size_, chunk_rows_, chunks_per_run_;
};

}  // namespace kdkernels::temperature_kl
