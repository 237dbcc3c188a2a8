// CPU kernels of the temperature_kl ops, compiled once per instruction set.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../common/parallel.h"
#include "call.h"
#include "lane_tiles.h"
#include "rescale.h"

namespace kdkernels::temperature_kl {
namespace {

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
void run_stored(const Call<T>& call, const void* student, const void* teacher, Run&& run, Scratch<T>& scratch) {
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

// Processes rows whose classes are adjacent. Neighbouring rows are processed in pairs if the divergence
// is plain and each of them is computed in one part, from logits of the same dtype: 0.86 (350 classes)
// to 0.95 (1000) of the time of one after the other.
template <typename T>
class AdjacentClasses {
 public:
  AdjacentClasses(const Call<T>& call, const Rows& layout)
      : call_(call),
        layout_(layout),
        first_operand_(call.options.direction == Direction::reverse ? kStudent : kTeacher),
        in_pairs_(call.rows > 1 && call.classes <= kPart * simd::kLanes<T> && is_plain_divergence(call) &&
                  call.element_types[kStudent] == call.element_types[kTeacher]) {
    for (int k = 0; k < kOperands; ++k)
      if (call.x[k].defined()) data_[k] = static_cast<char*>(address(call.x[k])), sizes_[k] = call.x[k].element_size();
  }

  // The working memory of a thread: of two rows, the second one only if rows are processed in pairs.
  struct Memory {
    Scratch<T> first, second;
  };
  Memory make_memory() const { return {Scratch<T>(call_.classes), Scratch<T>(in_pairs_ ? call_.classes : 0)}; }

  // Processes rows [begin, end).
  void run(Memory& memory, int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end;) {
      const bool pair = in_pairs_ && row + 1 < end && call_.is_included(row) && call_.is_included(row + 1);
      const int64_t next = row + (pair ? 2 : 1);
      if (next < end) prefetch_row(next, memory.first);
      if (pair && next + 1 < end) prefetch_row(next + 1, memory.second);
      if (pair)
        run_pair(memory, row);
      else if (call_.is_included(row))
        run_row(memory.first, row);
      else
        clear_row(row);
      row = next;
    }
    if (call_.streaming) simd::fence();
  }

 private:
  char* row_address(int64_t row, int k) const { return data_[k] + layout_.offsets(row)[k] * sizes_[k]; }

  void prefetch_row(int64_t row, Scratch<T>& scratch) const {
    scratch.next_tile = {row_address(row, first_operand_), call_.classes * sizes_[first_operand_] / 64};
  }

  void run_row(Scratch<T>& scratch, int64_t row) const {
    run_stored<T>(
        call_, row_address(row, kStudent), row_address(row, kTeacher),
        [&](const auto& student, const auto& teacher) { return write_results(row, student, teacher, scratch, nullptr); }, scratch);
  }

  void run_pair(Memory& memory, int64_t row) const {
    const std::array<Scratch<T>*, 2> scratches{&memory.first, &memory.second};
    const std::array<Vec<T>, 2> temperatures{splat<T>(call_.row_temperature(row)), splat<T>(call_.row_temperature(row + 1))};
    auto run_as = [&](auto* type) {
      using Stored = std::remove_pointer_t<decltype(type)>;
      auto sources = [&](int k) {
        return std::array<Source<T, Stored>, 2>{Source<T, Stored>(row_address(row, k), call_.classes),
                                                Source<T, Stored>(row_address(row + 1, k), call_.classes)};
      };
      const auto students = sources(kStudent), teachers = sources(kTeacher);
      const auto computed = divergences_of_two_rows<T, Stored>(call_, students, teachers, temperatures, scratches);
      for (int i = 0; i < 2; ++i) write_results(row + i, students[i], teachers[i], *scratches[i], &computed[i]);
    };
    if constexpr (std::is_same_v<T, float>) {
      if (call_.element_types[kStudent] == ElementType::bfloat16) return run_as(static_cast<c10::BFloat16*>(nullptr));
      if (call_.element_types[kStudent] == ElementType::half) return run_as(static_cast<c10::Half*>(nullptr));
    }
    run_as(static_cast<T*>(nullptr));
  }

  template <typename Logits>
  void write_results(int64_t row, const Logits& student, const Logits& teacher, Scratch<T>& scratch, const Divergence<T>* computed) const {
    auto sink = [&](Operand k) {
      return Sink<T>(call_.is_wanted(k) ? row_address(row, k) : nullptr, call_.element_types[k], call_.classes, call_.streaming);
    };
    const Sink<T> final_student_sink = sink(kStudentGrad), teacher_sink = sink(kTeacherGrad);
    const Sink<T> student_sink =
        call_.row_scale ? Sink<T>(scratch.gradient_row(), ElementType::native, call_.classes, false) : final_student_sink;
    const auto result = run_tile<T, AcrossLanes>(call_, student, teacher, splat<T>(call_.row_temperature(row)),
                                                 splat<T>(call_.row_weight(row)), call_.is_wanted(kStudentGrad) ? &student_sink : nullptr,
                                                 call_.is_wanted(kTeacherGrad) ? &teacher_sink : nullptr, scratch, computed);
    if (call_.row_scale) call_.row_scale[row] = write_scaled(scratch.gradient_row(), call_.classes, final_student_sink);
    if (call_.row_loss) call_.row_loss[row] = result.value[0];
    if (call_.temperature_grad) call_.temperature_grad[row] = result.temperature_derivative[0];
  }

  // The results of a row that the mask excludes.
  void clear_row(int64_t row) const {
    if (call_.row_loss) call_.row_loss[row] = 0;
    if (call_.temperature_grad) call_.temperature_grad[row] = 0;
    if (call_.row_scale) call_.row_scale[row] = 1;
    for (int k : {kStudentGrad, kTeacherGrad})
      if (call_.is_wanted(Operand(k))) std::memset(row_address(row, k), 0, call_.classes * sizes_[k]);
  }

  const Call<T>& call_;
  const Rows& layout_;
  Operand first_operand_;
  bool in_pairs_;
  std::array<char*, kOperands> data_{};
  std::array<int64_t, kOperands> sizes_{};
};

template <typename T>
void run(Call<T>& call) {
  const int64_t dim = call.options.dim;
  // Up to this number of classes, vectors of rows take less time than one row after another: 0.3 times
  // as long at 21 classes, 0.6 at 100 and 0.9 at 300 with AVX-512 (float32, forward + backward of 1024
  // rows), and with AVX2 0.4, 0.7 and 1.1; float64 with AVX-512: 0.4, 0.8 and 1.3.
  constexpr int64_t few_classes = simd::kBytes == 64 ? (sizeof(T) == 4 ? 300 : 160) : simd::kBytes == 32 ? (sizeof(T) == 4 ? 200 : 96) : 24;
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
    parallel_for(
        0, tiles.count(), std::max<int64_t>(1, grain / tiles.logits_per_chunk()), [&] { return tiles.make_memory(); },
        [&](auto& memory, int64_t begin, int64_t end) { tiles.run(memory, begin, end); });
  } else {
    const AdjacentClasses<T> rows(call, layout);
    parallel_for(
        0, call.rows, std::max<int64_t>(1, grain / call.classes), [&] { return rows.make_memory(); },
        [&](auto& memory, int64_t begin, int64_t end) { rows.run(memory, begin, end); });
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
  call.streaming = bypasses_caches(student.nbytes());
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
