// CPU kernels of the temperature_kl ops, compiled once per instruction set.
#include "temperature_kl.h"

#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <memory>

#include "../common/convert.h"
#include "../common/memory.h"
#include "../common/parallel.h"
#include "divergence.h"
#include "forms.h"
#include "jsd.h"
#include "layout.h"
#include "tile.h"

namespace kdkernels::temperature_kl {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// The arguments of one call: the operands in the layout that the kernel needs, and one number per
// row, indexed by the logical row number.
template <typename T>
struct Call {
  Options options;
  std::array<at::Tensor, kOperands> x;  // gradients that are not wanted are undefined tensors
  std::array<ElementType, kOperands> element_types{};
  int64_t classes = 0, rows = 0;
  const T* temperature = nullptr;  // per row, or null
  const bool* mask = nullptr;
  const T* upstream = nullptr;  // gradient with respect to each row's loss, without `weight`; null for 1
  double weight = 1;            // weight of each row in the loss
  T* row_loss = nullptr;        // unweighted losses of the rows, or null
  T* temperature_grad = nullptr;
  float* row_scale = nullptr;  // if not null, the student's gradient is divided by a power of two stored here
  bool streaming = false;

  bool is_wanted(Operand k) const { return x[k].defined(); }
  bool any_gradient_wanted() const { return is_wanted(kStudentGrad) || is_wanted(kTeacherGrad) || temperature_grad; }
  bool is_included(int64_t row) const { return !mask || mask[row]; }
  T row_temperature(int64_t row) const { return temperature ? temperature[row] : static_cast<T>(options.temperature); }
  T row_weight(int64_t row) const { return static_cast<T>(weight) * (upstream ? upstream[row] : T(1)); }
};

// Memory of one thread for the data that one stage of a tile passes to the next.
template <typename T>
struct Scratch {
  explicit Scratch(int64_t tile) : size((tile + simd::kLanes<T> - 1) / simd::kLanes<T> * simd::kLanes<T>), storage(new T[4 * size]) {}
  int64_t size;
  std::unique_ptr<T[]> storage, centred, widened, gradient;
  T *weights = storage.get(), *difference = weights + size, *aux = difference + size, *aux2 = aux + size;
  PrefetchRange next_tile;

  // Memory for the centred logits of both networks, their logits in T, and a gradient, allocated on
  // first use because most tiles need none of them.
  T* centred_logits() {
    if (!centred) centred.reset(new T[2 * size]);
    return centred.get();
  }
  T* widened_logits() {
    if (!widened) widened.reset(new T[2 * size]);
    return widened.get();
  }
  T* gradient_row() {
    if (!gradient) gradient.reset(new T[size]);
    return gradient.get();
  }
};

// If the divergence exceeds this, the Jensen-Shannon divergence is computed from log-sum-exps of
// centred logits. Nothing cancels there, and the terms of the centred form, which grow with the
// divergence, are less accurate.
constexpr int kFarDivergence = 1;

// Whether the value and gradients are those of the divergence, without the changes of forms.h and
// jsd.h.
template <typename T>
bool is_plain_divergence(const Call<T>& call) {
  const Options& o = call.options;
  return o.direction != Direction::jsd && !call.temperature_grad && o.include_entropy && !(o.target_eps > 0);
}

// Computes losses and gradients of one tile. `temperature` and `weight` are those of its rows. Only
// plain divergences may have logits that are stored in another type than T.
template <typename T, typename Reduce, typename Stored = T>
ValueAndDerivative<T> run_tile(const Call<T>& call, const Source<T, Stored>& student, const Source<T, Stored>& teacher, Vec<T> temperature,
                               Vec<T> weight, const Sink<T>* student_out, const Sink<T>* teacher_out, Scratch<T>& scratch) {
  const Options& o = call.options;
  const bool jsd = o.direction == Direction::jsd, from_teacher = o.direction != Direction::reverse;
  const Sink<T>*base_out = from_teacher ? teacher_out : student_out, *other_out = from_teacher ? student_out : teacher_out;
  const bool wants_temperature_grad = call.temperature_grad != nullptr;
  const bool use_general_form = wants_temperature_grad || !o.include_entropy || o.target_eps > 0;
  const Vec<T> scale = weight * (o.scale_by_t2 ? temperature : T(1) / temperature);
  const T far_threshold = jsd ? T(kFarDivergence) : std::numeric_limits<T>::infinity();
  const bool wants_difference = !jsd && (other_out || use_general_form);
  T* difference = scratch.difference;

  auto finish = [&](const Divergence<T>& s, const auto& base, const auto& other) -> ValueAndDerivative<T> {
    if constexpr (std::is_same_v<std::decay_t<decltype(base)>, Source<T>>) {
      if (jsd)
        return Jsd<T>(o.beta).template operator()<Reduce>(s, base, other, scratch.weights, scratch.difference, scratch.aux, scratch.aux2,
                                                          scale, call.any_gradient_wanted(), base_out, other_out);
      if (use_general_form) {
        const Form<T> form{static_cast<T>(o.target_eps), o.include_entropy, static_cast<T>(call.classes)};
        return general_form<T, Reduce>(s, base, other, scratch.weights, difference, form, scale, call.any_gradient_wanted(), base_out,
                                       other_out);
      }
    }
    if (other_out) write_other_gradient<T>(s, scratch.weights, difference, scale, *other_out);
    if (base_out) write_base_gradient<T>(s, base, other, scratch.weights, scale, *base_out);
    return {s.kl, Vec<T>{}, s.remaining_factor};
  };

  const auto &base = from_teacher ? teacher : student, &other = from_teacher ? student : teacher;
  const auto s = divergence<T, Reduce, false>(base, other, temperature, scratch.weights, difference, wants_difference, scratch.next_tile,
                                              far_threshold);
  Mask<T> rows_to_centre = needs_centring<T>(s);
  ValueAndDerivative<T> result;
  if (__builtin_expect(!any(rows_to_centre), 1)) {
    result = finish(s, base, other);
    if (o.target_eps > 0)
      rows_to_centre = ~(result.value < std::numeric_limits<T>::infinity());  // target_eps also weights classes without probability
  }
  if (__builtin_expect(any(rows_to_centre), 0)) {
    // Rows that are not marked are computed again from the logits as they are.
    T *centred_base = scratch.centred_logits(), *centred_other = centred_base + scratch.size;
    centre<T, Reduce>(base, rows_to_centre, centred_base);
    centre<T, Reduce>(other, rows_to_centre, centred_other);
    const Source<T> base_source(centred_base, base.count()), other_source(centred_other, other.count());
    result = finish(divergence<T, Reduce, true>(base_source, other_source, temperature * T(kQuarter), scratch.weights, difference,
                                                wants_difference, {}, far_threshold),
                    base_source, other_source);
  }
  // With scale_by_t2 the results are T^2 V and its derivative 2 T V - T S, otherwise V and -S / T.
  if (wants_temperature_grad) {
    const T unit = T(kDerivativeUnit), inverse_unit = T(1) / unit;
    result.temperature_derivative = o.scale_by_t2 ? (T(2) * unit * result.value - result.temperature_derivative) *
                                                        (result.remaining_factor * temperature)  // remaining_factor is 1 or 1 / T
                                                  : -(result.temperature_derivative * result.remaining_factor) / temperature;
    result.temperature_derivative = (result.temperature_derivative * weight) * inverse_unit;
  }
  result.value *= o.scale_by_t2 ? (result.remaining_factor * temperature) * temperature : result.remaining_factor;
  return result;
}

// The power of two by which a row of a gradient is divided before it is saved in float16, where
// `largest` is the largest magnitude in the row. The largest magnitude then lies in [2^14, 2^15),
// so nothing overflows, and only numbers below 2^-38 times the largest underflow.
inline float saved_row_scale(double largest) {
  if (!(largest > 0 && std::isfinite(largest))) return 1;
  int exponent;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0f, std::clamp(exponent - 15, -126, 126));
}

// Writes a gradient divided by a power of two, and returns this power.
template <typename T>
float write_scaled(T* gradient, int64_t classes, const Sink<T>& out) {
  constexpr int lanes = simd::kLanes<T>;
  const int64_t vectors = (classes + lanes - 1) / lanes;
  for (int64_t j = classes; j < vectors * lanes; ++j) gradient[j] = 0;
  Vec<T> largest{};
  for (int64_t j = 0; j < vectors; ++j) {
    const Vec<T> g = simd::load<T>(gradient + j * lanes);
    largest = simd::max(g < T(0) ? -g : g, largest);
  }
  const float scale = saved_row_scale(simd::largest<T>(largest));
  const Vec<T> inverse = splat<T>(T(1) / scale);
  for (int64_t j = 0; j < vectors; ++j) out.write(j, simd::load<T>(gradient + j * lanes) * inverse);
  return scale;
}

// Calls run(student, teacher) with the logits of a row as they are stored or, if the divergence is
// not plain or the networks have different dtypes, converted to T.
template <typename T, typename Run>
ValueAndDerivative<T> run_stored(const Call<T>& call, const void* student, const void* teacher, Run&& run, Scratch<T>& scratch) {
  const ElementType types[] = {call.element_types[kStudent], call.element_types[kTeacher]};
  if constexpr (std::is_same_v<T, float>) {
    auto run_as = [&](auto* type) {
      using Stored = std::remove_pointer_t<decltype(type)>;
      return run(Source<T, Stored>(student, call.classes), Source<T, Stored>(teacher, call.classes));
    };
    if (types[0] == types[1] && is_plain_divergence(call)) {
      if (types[0] == ElementType::bfloat16) return run_as(static_cast<c10::BFloat16*>(nullptr));
      if (types[0] == ElementType::half) return run_as(static_cast<c10::Half*>(nullptr));
    }
    const void* stored[] = {student, teacher};
    const T* native[2];
    for (int k = 0; k < 2; ++k) {
      T* row = types[k] == ElementType::native ? nullptr : scratch.widened_logits() + k * scratch.size;
      if (types[k] == ElementType::bfloat16) convert(static_cast<const c10::BFloat16*>(stored[k]), row, call.classes);
      if (types[k] == ElementType::half) convert(static_cast<const c10::Half*>(stored[k]), row, call.classes);
      native[k] = row ? row : static_cast<const T*>(stored[k]);
    }
    return run(Source<T>(native[0], call.classes), Source<T>(native[1], call.classes));
  } else {
    return run(Source<T>(student, call.classes), Source<T>(teacher, call.classes));
  }
}

// Processes rows [begin, end) for the layout in which the classes of a row are adjacent.
template <typename T>
void run_rows(const Call<T>& call, const Rows& layout, int64_t begin, int64_t end) {
  Scratch<T> scratch(call.classes);
  for (int64_t row = begin; row < end; ++row) {
    const auto offset = layout.offsets(row);
    auto row_address = [&](int k) { return static_cast<char*>(address(call.x[k])) + offset[k] * call.x[k].element_size(); };
    if (!call.is_included(row)) {
      if (call.row_loss) call.row_loss[row] = 0;
      if (call.temperature_grad) call.temperature_grad[row] = 0;
      if (call.row_scale) call.row_scale[row] = 1;
      for (int k : {kStudentGrad, kTeacherGrad})
        if (call.is_wanted(Operand(k))) std::memset(row_address(k), 0, call.classes * call.x[k].element_size());
      continue;
    }
    const Operand first_operand = call.options.direction == Direction::reverse ? kStudent : kTeacher;
    if (row + 1 < end)
      scratch.next_tile = {row_address(first_operand) +
                               (layout.offsets(row + 1)[first_operand] - offset[first_operand]) * call.x[first_operand].element_size(),
                           call.classes * call.x[first_operand].element_size() / 64};
    auto sink = [&](Operand k) {
      return Sink<T>(call.is_wanted(k) ? row_address(k) : nullptr, call.element_types[k], call.classes, call.streaming);
    };
    const Sink<T> final_student_sink = sink(kStudentGrad), teacher_sink = sink(kTeacherGrad);
    const Sink<T> student_sink =
        call.row_scale ? Sink<T>(scratch.gradient_row(), ElementType::native, call.classes, false) : final_student_sink;
    const auto result = run_stored<T>(
        call, row_address(kStudent), row_address(kTeacher),
        [&](const auto& student, const auto& teacher) {
          return run_tile<T, AcrossLanes>(call, student, teacher, splat<T>(call.row_temperature(row)), splat<T>(call.row_weight(row)),
                                          call.is_wanted(kStudentGrad) ? &student_sink : nullptr,
                                          call.is_wanted(kTeacherGrad) ? &teacher_sink : nullptr, scratch);
        },
        scratch);
    if (call.row_scale) call.row_scale[row] = write_scaled(scratch.gradient_row(), call.classes, final_student_sink);
    if (call.row_loss) call.row_loss[row] = result.value[0];
    if (call.temperature_grad) call.temperature_grad[row] = result.temperature_derivative[0];
  }
  if (call.streaming) simd::fence();
}

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

  void operator()(int64_t begin, int64_t end) const {
    Scratch<T> scratch(tile_size_);
    const std::unique_ptr<T[]> copies(new T[kOperands * logits_per_chunk()]());  // zeros for the lanes past the end of a run
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
      for (int64_t j = 0; j < call_.classes; ++j, memory += stride) {
        for (int64_t v = 0; v < whole_vectors; ++v) {
          if constexpr (in)
            convert(memory + v * lanes, tiles + v * tile_size_ + j * lanes, lanes);
          else
            convert(tiles + v * tile_size_ + j * lanes, memory + v * lanes, lanes);
        }
        for (int64_t row = whole_vectors * lanes; row < count; ++row) {
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

template <typename T>
void run(Call<T>& call) {
  const int64_t dim = call.options.dim;
  // Up to this number of classes, vectors of rows take less time than one row after another: with
  // AVX2 a fifth at 2 classes, half at 12, the same at 24, in float32, bfloat16 and float64.
  constexpr int64_t few_classes = 20;
  const bool has_few_classes = call.classes <= few_classes && Rows(call.x, dim).run() >= 4 * simd::kLanes<T>,
             per_lane = has_few_classes || (!classes_adjacent(call.x[kStudent], dim) && rows_adjacent(call.x[kStudent], dim));
  const std::array<at::Tensor, kOperands> originals = call.x;
  for (int k = 0; k < kOperands; ++k) {
    at::Tensor& x = call.x[k];
    if (!x.defined()) continue;
    // Convert first: the converted tensor has its own strides, even if the dimensions of the
    // operand overlap.
    if (element_type_of<T>(x.scalar_type()) == ElementType::other) x = x.to(c10::CppTypeToScalarType<T>::value);
    if (!has_few_classes) x = per_lane ? with_rows_adjacent(x, dim) : with_classes_adjacent(x, dim);
    call.element_types[k] = element_type_of<T>(x.scalar_type());
  }
  const Rows layout(call.x, dim);
  constexpr int64_t grain = 1 << 14;  // with fewer logits per thread, a second thread costs more than it saves
  if (per_lane) {
    const LaneTiles<T> tiles(call, layout);
    parallel_for(0, tiles.count(), std::max<int64_t>(1, grain / tiles.logits_per_chunk()), tiles);
  } else {
    parallel_for(0, call.rows, std::max<int64_t>(1, grain / call.classes),
                 [&](int64_t begin, int64_t end) { run_rows(call, layout, begin, end); });
  }
  for (int k : {kStudentGrad, kTeacherGrad})
    if (call.x[k].defined() && !call.x[k].is_same(originals[k])) originals[k].copy_(call.x[k]);
}

// Per-row numbers in the kernel's dtype and order. Stores the tensor in `keep_alive`, so that the
// returned pointer stays valid.
template <typename T>
const T* row_numbers(const at::Tensor& x, std::vector<at::Tensor>& keep_alive) {
  keep_alive.push_back(x.to(c10::CppTypeToScalarType<T>::value).contiguous());
  return keep_alive.back().const_data_ptr<T>();
}

// The weight of a row in the loss.
double row_weight(const Options& o, int64_t classes, int64_t rows, const bool* mask, const OptionalTensor& normalizer) {
  if (o.reduction == Reduction::none || o.reduction == Reduction::sum) return 1;
  double count = normalizer ? normalizer->item().toDouble() : static_cast<double>(mask ? std::count(mask, mask + rows, true) : rows);
  TORCH_CHECK_VALUE(!normalizer || (count > 0 && std::isfinite(count)), "normalizer must be a finite number > 0, got ", count);
  if (!normalizer) count = std::max(count, 1.0);  // if all rows are masked, the loss is an empty sum, 0
  return 1 / (o.reduction == Reduction::mean ? count * static_cast<double>(classes) : count);
}

template <typename T>
Call<T> make_call(const Options& o, const at::Tensor& student, const at::Tensor& teacher, const OptionalTensor& row_temperature,
                  const OptionalTensor& mask, const OptionalTensor& normalizer, std::vector<at::Tensor>& keep_alive) {
  Call<T> call;
  call.options = o;
  call.x[kStudent] = student;
  call.x[kTeacher] = teacher;
  call.classes = student.size(o.dim);
  call.rows = student.numel() / call.classes;
  if (row_temperature) {
    call.temperature = row_numbers<T>(*row_temperature, keep_alive);
    for (int64_t i = 0; i < call.rows; ++i)
      TORCH_CHECK_VALUE(call.temperature[i] > 0 && std::isfinite(call.temperature[i]),
                        "temperature must be finite and > 0 everywhere, got ", call.temperature[i], " in row ", i);
  }
  if (mask) {
    keep_alive.push_back(mask->contiguous());
    call.mask = keep_alive.back().const_data_ptr<bool>();
  }
  call.weight = row_weight(o, call.classes, call.rows, call.mask, normalizer);
  call.streaming = student.nbytes() > (size_t(32) << 20);
  return call;
}

template <typename T>
at::Tensor reduce(const Call<T>& call, const at::Tensor& row_loss) {
  if (call.options.reduction == Reduction::none) return row_loss;
  double total = 0;
  for (int64_t i = 0; i < call.rows; ++i) total += static_cast<double>(call.row_loss[i]);
  return at::empty({}, row_loss.options()).fill_(total * call.weight);
}

template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const Options& o, const at::Tensor& student, const at::Tensor& teacher,
                                                       const OptionalTensor& row_temperature, const OptionalTensor& mask,
                                                       const OptionalTensor& normalizer, bool save_grad) {
  std::vector<at::Tensor> keep_alive;
  Call<T> call = make_call<T>(o, student, teacher, row_temperature, mask, normalizer, keep_alive);
  const at::Tensor row_loss = at::empty(row_shape(student, o.dim), student.options().dtype(c10::CppTypeToScalarType<T>::value));
  const at::Tensor grad = save_grad ? recycled_empty_like(student) : at::empty({0}, student.options());
  call.row_loss = row_loss.mutable_data_ptr<T>();
  const bool scaled = save_grad && student.scalar_type() == at::kHalf;
  const at::Tensor row_scale = scaled ? at::empty(row_shape(student, o.dim), student.options().dtype(at::kFloat))
                                      : at::empty({0}, student.options().dtype(at::kFloat));
  if (save_grad) call.x[kStudentGrad] = grad;
  if (scaled) call.row_scale = row_scale.mutable_data_ptr<float>();
  if (call.rows > 0) run(call);
  return {reduce(call, row_loss), grad, row_scale};
}

template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const Options& o, const at::Tensor& grad_loss, const at::Tensor& student,
                                                        const at::Tensor& teacher, const OptionalTensor& row_temperature,
                                                        const OptionalTensor& mask, const OptionalTensor& normalizer,
                                                        std::array<bool, 3> wanted) {
  std::vector<at::Tensor> keep_alive;
  Call<T> call = make_call<T>(o, student, teacher, row_temperature, mask, normalizer, keep_alive);
  const at::Tensor empty = at::empty({0}, student.options());
  const at::Tensor grad_student = wanted[0] ? recycled_empty_like(student) : empty;
  const at::Tensor grad_teacher = wanted[1] ? recycled_empty_like(teacher) : empty;
  const at::Tensor grad_temperature =
      wanted[2] ? at::empty(row_shape(student, o.dim), student.options().dtype(c10::CppTypeToScalarType<T>::value)) : empty;
  if (wanted[0]) call.x[kStudentGrad] = grad_student;
  if (wanted[1]) call.x[kTeacherGrad] = grad_teacher;
  if (wanted[2]) call.temperature_grad = grad_temperature.mutable_data_ptr<T>();
  if (o.reduction == Reduction::none)
    call.upstream = row_numbers<T>(grad_loss, keep_alive);
  else
    call.weight *= grad_loss.item().toDouble();
  if (call.rows > 0) run(call);
  const bool cast_temperature = wanted[2] && row_temperature;
  return {grad_student, grad_teacher, cast_temperature ? grad_temperature.to(row_temperature->scalar_type()) : grad_temperature};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> temperature_kl_cpu(const at::Tensor& student, const at::Tensor& teacher, double temperature,
                                                                  const OptionalTensor& row_temperature, const OptionalTensor& mask,
                                                                  const OptionalTensor& normalizer, int64_t dim, int64_t direction,
                                                                  double beta, int64_t reduction, bool scale_by_t2, bool include_entropy,
                                                                  double target_eps, bool save_grad) {
  const Options o = parse_options(student, temperature, dim, direction, beta, reduction, scale_by_t2, include_entropy, target_eps);
  check_inputs(student, teacher, row_temperature, mask, normalizer, o);
  const auto kernel = compute_dtype(student, teacher) == at::kDouble ? forward<double> : forward<float>;
  return kernel(o, student, teacher, row_temperature, mask, normalizer, save_grad);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> temperature_kl_backward_cpu(
    const at::Tensor& grad_loss, const at::Tensor& student, const at::Tensor& teacher, double temperature,
    const OptionalTensor& row_temperature, const OptionalTensor& mask, const OptionalTensor& normalizer, int64_t dim, int64_t direction,
    double beta, int64_t reduction, bool scale_by_t2, bool include_entropy, double target_eps, std::array<bool, 3> wanted) {
  const Options o = parse_options(student, temperature, dim, direction, beta, reduction, scale_by_t2, include_entropy, target_eps);
  check_inputs(student, teacher, row_temperature, mask, normalizer, o);
  check_floating(grad_loss, "grad_loss");
  check_device(grad_loss, "grad_loss", student.device());
  if (o.reduction == Reduction::none)
    check_shape(grad_loss, "grad_loss", row_shape(student, o.dim));
  else
    check_shape(grad_loss, "grad_loss", {});
  const auto kernel = compute_dtype(student, teacher) == at::kDouble ? backward<double> : backward<float>;
  return kernel(o, grad_loss, student, teacher, row_temperature, mask, normalizer, wanted);
}

// out = grad * scale * upstream, multiplied in T and rounded once. All tensors have the shape of
// grad. The gradient is multiplied by the two factors one after the other, because their product
// may leave the range of T even if the result does not.
template <typename Number, typename T>
void multiply(const at::Tensor& out, const at::Tensor& grad, const at::Tensor& scale, const at::Tensor& upstream) {
  auto iterator = at::TensorIteratorConfig()
                      .add_output(out)
                      .add_const_input(grad)
                      .add_const_input(scale)
                      .add_const_input(upstream)
                      .check_all_same_dtype(false)
                      .resize_outputs(false)
                      .build();
  iterator.for_each([](char** data, const int64_t* strides, int64_t count) {
    constexpr int64_t block = 256;
    T numbers[block];
    const bool dense = strides[0] == sizeof(Number) && strides[1] == sizeof(Number);
    for (int64_t begin = 0; begin < count; begin += block) {
      const int64_t length = std::min(block, count - begin);
      char* to = data[0] + begin * strides[0];
      const char *from = data[1] + begin * strides[1], *scales = data[2] + begin * strides[2], *factors = data[3] + begin * strides[3];
      auto read = [](const char* p) { return *reinterpret_cast<const T*>(p); };
      if (dense)
        convert(reinterpret_cast<const Number*>(from), numbers, length);
      else
        for (int64_t i = 0; i < length; ++i) numbers[i] = static_cast<T>(*reinterpret_cast<const Number*>(from + i * strides[1]));
      if (strides[2] == 0 && strides[3] == 0) {
        const T first = read(scales), second = read(factors);
        for (int64_t i = 0; i < length; ++i) numbers[i] = numbers[i] * first * second;
      } else {
        for (int64_t i = 0; i < length; ++i) numbers[i] = numbers[i] * read(scales + i * strides[2]) * read(factors + i * strides[3]);
      }
      if (dense)
        convert(numbers, reinterpret_cast<Number*>(to), length);
      else
        for (int64_t i = 0; i < length; ++i) *reinterpret_cast<Number*>(to + i * strides[0]) = static_cast<Number>(numbers[i]);
    }
  });
}

void rescale(const at::Tensor& out, const at::Tensor& grad, const at::Tensor& row_scale, const at::Tensor& grad_loss,
             const OptionalTensor& mask, int64_t dim) {
  if (grad.numel() == 0) return;
  const at::ScalarType dtype = grad.scalar_type();
  const at::ScalarType compute = dtype == at::kDouble || grad_loss.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto rows = row_shape(grad, dim);
  auto expand_rows = [&](const at::Tensor& x) { return (x.dim() == 0 ? x : x.unsqueeze(dim)).expand_as(grad); };
  at::Tensor upstream = grad_loss.to(compute);
  if (mask && !at::isfinite(upstream).all().item().toBool())  // 0 * inf is NaN, not 0
    upstream = at::where(*mask, upstream, at::zeros({}, upstream.options()));
  const at::Tensor scale = row_scale.sizes() == at::IntArrayRef(rows) ? row_scale.to(compute) : at::ones({}, upstream.options());
  auto dispatch = [&](auto example) {
    using Number = decltype(example);
    if (compute == at::kDouble)
      multiply<Number, double>(out, grad, expand_rows(scale), expand_rows(upstream));
    else if constexpr (!std::is_same_v<Number, double>)
      multiply<Number, float>(out, grad, expand_rows(scale), expand_rows(upstream));
  };
  if (dtype == at::kDouble) return dispatch(double());
  if (dtype == at::kFloat) return dispatch(float());
  if (dtype == at::kBFloat16) return dispatch(c10::BFloat16());
  return dispatch(c10::Half());
}

// Whether rescaling changes nothing: rows without a scale, and an upstream gradient that is the
// number 1, as it nearly always is for a mean or a sum.
bool is_identity(const at::Tensor& row_scale, const at::Tensor& grad_loss) {
  return row_scale.numel() == 0 && grad_loss.dim() == 0 && grad_loss.item().toDouble() == 1;
}

at::Tensor temperature_kl_rescale_cpu(const at::Tensor& grad, const at::Tensor& row_scale, const at::Tensor& grad_loss,
                                      const OptionalTensor& mask, int64_t dim) {
  check_rescale(grad, row_scale, grad_loss, mask, dim);
  if (is_identity(row_scale, grad_loss)) return grad.clone();
  at::Tensor out = recycled_empty_like(grad);
  rescale(out, grad, row_scale, grad_loss, mask, dim < 0 ? dim + grad.dim() : dim);
  return out;
}

void temperature_kl_rescale_in_place_cpu(at::Tensor& grad, const at::Tensor& row_scale, const at::Tensor& grad_loss,
                                         const OptionalTensor& mask, int64_t dim) {
  check_rescale(grad, row_scale, grad_loss, mask, dim);
  if (!is_identity(row_scale, grad_loss)) rescale(grad, grad, row_scale, grad_loss, mask, dim < 0 ? dim + grad.dim() : dim);
}

}  // namespace
}  // namespace kdkernels::temperature_kl

TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("temperature_kl", kdkernels::temperature_kl::temperature_kl_cpu);
  m.impl("temperature_kl_backward", kdkernels::temperature_kl::temperature_kl_backward_cpu);
  m.impl("temperature_kl_rescale", kdkernels::temperature_kl::temperature_kl_rescale_cpu);
  m.impl("temperature_kl_rescale_", kdkernels::temperature_kl::temperature_kl_rescale_in_place_cpu);
}
