// CPU kernels of the temperature_kl ops. Compiled once per instruction set.
#include "temperature_kl.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <memory>

#include "convert.h"
#include "memory.h"
#include "temperature_kl/divergence.h"
#include "temperature_kl/forms.h"
#include "temperature_kl/jsd.h"
#include "temperature_kl/layout.h"
#include "temperature_kl/tile.h"

namespace kdkernels::temperature_kl {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// One call: operands in kernel layout and one number per row, all indexed by the logical row.
template <typename T>
struct Call {
  Options options;
  std::array<at::Tensor, kOperands> x;  // the gradients are undefined where they are not wanted
  int64_t classes = 0, rows = 0;
  const T* temperature = nullptr;  // per row, or null
  const bool* mask = nullptr;
  const T* upstream = nullptr;  // dLoss / dRow before `weight`, or null for 1
  double weight = 1;            // of a row in the loss
  T* row_loss = nullptr;        // unweighted, or null
  T* temperature_grad = nullptr;
  bool streamed = false;

  bool wants(Operand k) const { return x[k].defined(); }
  bool gradients() const { return wants(kStudentGrad) || wants(kTeacherGrad) || temperature_grad; }
  bool kept(int64_t row) const { return !mask || mask[row]; }
  T row_temperature(int64_t row) const { return temperature ? temperature[row] : static_cast<T>(options.temperature); }
  T row_weight(int64_t row) const { return static_cast<T>(weight) * (upstream ? upstream[row] : T(1)); }
};

// Scratch of one thread: copies of a tile where it is not used in place, and what its stages hand on.
template <typename T>
struct Scratch {
  Scratch(int64_t tile, bool copies) : tile_size((tile + 15) / 16 * 16) {
    storage.reset(new T[tile_size * (copies ? 7 : 3) + simd::kLanes<T>]);
    T* p = storage.get();
    for (T** slot : {&e, &gap, &aux}) *slot = p, p += tile_size;
    for (int k = 0; copies && k < kOperands; ++k) copy[k] = p, p += tile_size;
  }
  int64_t tile_size;
  std::unique_ptr<T[]> storage;
  T *e, *gap, *aux;
  std::array<T*, kOperands> copy{};
};

// Losses and gradients of one tile. `temperature` and `weight` are those of its rows.
template <typename T, typename Reduce>
ValueAndSlope<T> run_tile(const Call<T>& call, const Source<T>& student, const Source<T>& teacher, Vec<T> temperature, Vec<T> weight,
                          const Sink<T>* student_out, const Sink<T>* teacher_out, Scratch<T>& scratch) {
  const Options& o = call.options;
  const Vec<T> inv_t = T(1) / temperature;
  const Vec<T> factor = o.scale_by_t2 ? temperature * temperature : splat<T>(T(1));
  const Vec<T> scale = weight * factor * inv_t;
  const bool slope = call.temperature_grad != nullptr;
  ValueAndSlope<T> result;
  if (o.direction == Direction::jsd) {
    const auto s = divergence<T, Reduce>(teacher, student, inv_t, scratch.e, nullptr);
    result = Jsd<T>(o.beta).template operator()<Reduce>(s, teacher, student, scratch.e, scratch.gap, scratch.aux, scale, call.gradients(),
                                                        teacher_out, student_out);
  } else {
    const bool forward = o.direction == Direction::forward;
    const Source<T>&base = forward ? teacher : student, &other = forward ? student : teacher;
    const Sink<T>*base_out = forward ? teacher_out : student_out, *other_out = forward ? student_out : teacher_out;
    const bool general = slope || !o.include_entropy || o.target_eps > 0;
    const auto s = divergence<T, Reduce>(base, other, inv_t, scratch.e, other_out || general ? scratch.gap : nullptr);
    if (general) {
      const Form<T> form{static_cast<T>(o.target_eps), o.include_entropy, static_cast<T>(call.classes)};
      result = general_form<T, Reduce>(s, base, other, scratch.e, scratch.gap, form, scale, call.gradients(), base_out, other_out);
    } else {
      if (other_out) write_other_gradient<T>(s, base.vectors(), scratch.e, scratch.gap, scale, *other_out);
      if (base_out) write_base_gradient<T>(s, base, other, scratch.e, scale, *base_out);
      result = {s.kl, Vec<T>{}};
    }
  }
  if (slope) {
    const Vec<T> own = o.scale_by_t2 ? T(2) * temperature * result.value : Vec<T>{};
    result.slope = weight * (own + factor * result.slope);
  }
  result.value *= factor;
  return result;
}

template <typename F>
void with_element_type(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kDouble: return f(double{});
    case at::kBFloat16: return f(c10::BFloat16{});
    case at::kHalf: return f(c10::Half{});
    default: return f(float{});
  }
}

template <typename T>
bool in_place(const at::Tensor& x) {
  return x.scalar_type() == c10::CppTypeToScalarType<T>::value;
}

// Rows [begin, end) whose classes are adjacent.
template <typename T>
void run_rows(const Call<T>& call, const Rows& layout, int64_t begin, int64_t end) {
  bool copies = false;
  for (const at::Tensor& x : call.x) copies |= x.defined() && !in_place<T>(x);
  Scratch<T> scratch(call.classes + simd::kLanes<T>, copies);
  for (int64_t row = begin; row < end; ++row) {
    const auto offset = layout.offsets(row);
    if (!call.kept(row)) {
      if (call.row_loss) call.row_loss[row] = 0;
      if (call.temperature_grad) call.temperature_grad[row] = 0;
      for (int k : {kStudentGrad, kTeacherGrad}) {
        const at::Tensor& x = call.x[k];
        if (x.defined()) std::memset(static_cast<char*>(x.data_ptr()) + offset[k] * x.element_size(), 0, call.classes * x.element_size());
      }
      continue;
    }
    std::array<T*, kOperands> at{};
    for (int k = 0; k < kOperands; ++k) {
      const at::Tensor& x = call.x[k];
      if (!x.defined()) continue;
      at[k] = in_place<T>(x) ? static_cast<T*>(x.data_ptr()) + offset[k] : scratch.copy[k];
      if (k <= kTeacher && !in_place<T>(x))
        with_element_type(x.scalar_type(), [&](auto element) {
          convert(static_cast<const decltype(element)*>(x.const_data_ptr()) + offset[k], at[k], call.classes);
        });
    }
    auto sink = [&](int k) {
      const bool aligned = reinterpret_cast<uintptr_t>(at[k]) % simd::kBytes == 0;
      return Sink<T>(at[k], call.classes, call.streamed && aligned && at[k] != scratch.copy[k]);
    };
    const Source<T> student(at[kStudent], call.classes), teacher(at[kTeacher], call.classes);
    const Sink<T> student_sink = sink(kStudentGrad), teacher_sink = sink(kTeacherGrad);
    const auto result = run_tile<T, AcrossLanes>(call, student, teacher, splat<T>(call.row_temperature(row)), splat<T>(call.row_weight(row)),
                                                 at[kStudentGrad] ? &student_sink : nullptr, at[kTeacherGrad] ? &teacher_sink : nullptr, scratch);
    if (call.row_loss) call.row_loss[row] = result.value[0];
    if (call.temperature_grad) call.temperature_grad[row] = result.slope[0];
    for (int k : {kStudentGrad, kTeacherGrad}) {
      const at::Tensor& x = call.x[k];
      if (x.defined() && !in_place<T>(x))
        with_element_type(x.scalar_type(), [&](auto element) {
          convert(at[k], static_cast<decltype(element)*>(x.data_ptr()) + offset[k], call.classes);
        });
    }
  }
  if (call.streamed) simd::fence();
}

// Adjacent rows are worked on a vector at a time, from copies [vector][class][lane]: the classes of a map can lie a power of two apart in
// memory, where they would evict one another from the cache. Several vectors are copied at once, to read whole runs of a class.
template <typename T>
int64_t vectors_at_once(int64_t classes) {
  const int64_t bytes = classes * simd::kBytes;
  return std::clamp<int64_t>((int64_t(16) << 10) / bytes, 1, 8);
}

// Chunk `chunk` of each run of adjacent rows.
template <typename T>
void run_lanes(const Call<T>& call, const Rows& layout, int64_t begin, int64_t end) {
  constexpr int lanes = simd::kLanes<T>;
  const int64_t width = vectors_at_once<T>(call.classes) * lanes, run = layout.run(), chunks = (run + width - 1) / width;
  Scratch<T> scratch(call.classes * width, true);
  std::fill_n(scratch.storage.get(), scratch.tile_size * 7, T(0));  // lanes past the end of a run compute on zeros
  const int64_t tile = call.classes * lanes;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i / chunks * run + i % chunks * width, count = std::min(width, run - i % chunks * width);
    const auto offset = layout.offsets(first);
    auto each_run = [&](int k, auto body) {
      const at::Tensor& x = call.x[k];
      with_element_type(x.scalar_type(), [&](auto element) {
        auto* p = static_cast<decltype(element)*>(x.data_ptr()) + offset[k];
        const int64_t stride = x.stride(call.options.dim);
        for (int64_t j = 0; j < call.classes; ++j)
          for (int64_t v = 0; v * lanes < count; ++v)
            body(p + j * stride + v * lanes, scratch.copy[k] + v * tile + j * lanes, std::min<int64_t>(lanes, count - v * lanes));
      });
    };
    for (int k : {kStudent, kTeacher})
      each_run(k, [](auto* from, T* to, int64_t n) { n == lanes ? convert(from, to, lanes) : convert(from, to, n); });
    for (int64_t v = 0; v * lanes < count; ++v) {
      const int64_t row = first + v * lanes;
      const int here = static_cast<int>(std::min<int64_t>(lanes, count - v * lanes));
      Vec<T> temperature = splat<T>(T(1)), weight{};
      for (int l = 0; l < here; ++l) {
        temperature[l] = call.row_temperature(row + l);
        weight[l] = call.row_weight(row + l);
        // A masked row takes part with equal nets, so that not even its NaN reaches a result.
        if (!call.kept(row + l))
          for (int64_t j = 0; j < call.classes; ++j)
            for (int k : {kStudent, kTeacher}) scratch.copy[k][v * tile + j * lanes + l] = 0;
      }
      const Source<T> student(scratch.copy[kStudent] + v * tile, tile), teacher(scratch.copy[kTeacher] + v * tile, tile);
      const Sink<T> student_sink(scratch.copy[kStudentGrad] + v * tile, tile, false), teacher_sink(scratch.copy[kTeacherGrad] + v * tile, tile, false);
      const auto result = run_tile<T, PerLane>(call, student, teacher, temperature, weight, call.wants(kStudentGrad) ? &student_sink : nullptr,
                                               call.wants(kTeacherGrad) ? &teacher_sink : nullptr, scratch);
      for (int l = 0; l < here; ++l) {
        const bool kept = call.kept(row + l);
        if (call.row_loss) call.row_loss[row + l] = kept ? result.value[l] : T(0);
        if (call.temperature_grad) call.temperature_grad[row + l] = kept ? result.slope[l] : T(0);
        for (int k : {kStudentGrad, kTeacherGrad})
          for (int64_t j = 0; !kept && call.wants(Operand(k)) && j < call.classes; ++j) scratch.copy[k][v * tile + j * lanes + l] = 0;
      }
    }
    for (int k : {kStudentGrad, kTeacherGrad})
      if (call.wants(Operand(k))) each_run(k, [](auto* to, const T* from, int64_t n) { n == lanes ? convert(from, to, lanes) : convert(from, to, n); });
  }
}

template <typename T>
void run(Call<T>& call) {
  const int64_t dim = call.options.dim;
  const bool lanes = !classes_adjacent(call.x[kStudent], dim) && rows_adjacent(call.x[kStudent], dim);
  const std::array<at::Tensor, kOperands> wanted = call.x;
  for (at::Tensor& x : call.x)
    if (x.defined()) x = lanes ? with_rows_adjacent(x, dim) : with_classes_adjacent(x, dim);
  const Rows layout(call.x, dim);
  constexpr int64_t grain = 1 << 14;  // logits per thread below which a second thread costs more than it brings
  if (lanes) {
    const int64_t width = vectors_at_once<T>(call.classes) * simd::kLanes<T>, run = layout.run(), chunks = (run + width - 1) / width;
    at::parallel_for(0, call.rows / run * chunks, std::max<int64_t>(1, grain / (width * call.classes)),
                     [&](int64_t begin, int64_t end) { run_lanes(call, layout, begin, end); });
  } else {
    at::parallel_for(0, call.rows, std::max<int64_t>(1, grain / call.classes),
                     [&](int64_t begin, int64_t end) { run_rows(call, layout, begin, end); });
  }
  for (int k : {kStudentGrad, kTeacherGrad})
    if (call.x[k].defined() && !call.x[k].is_same(wanted[k])) wanted[k].copy_(call.x[k]);
}

// Per-row numbers in the kernel's type and order; keeps them alive in `holder`.
template <typename T>
const T* row_numbers(const at::Tensor& x, std::vector<at::Tensor>& holder) {
  holder.push_back(x.to(c10::CppTypeToScalarType<T>::value).contiguous());
  return holder.back().const_data_ptr<T>();
}

// The weight of a row in the loss.
double row_weight(const Options& o, int64_t classes, int64_t rows, const bool* mask, const OptionalTensor& normalizer) {
  if (o.reduction == Reduction::none || o.reduction == Reduction::sum) return 1;
  double count = normalizer ? normalizer->item().toDouble() : static_cast<double>(mask ? std::count(mask, mask + rows, true) : rows);
  if (!normalizer) count = std::max(count, 1.0);  // nothing kept: the loss is the empty sum, 0
  return 1 / (o.reduction == Reduction::mean ? count * static_cast<double>(classes) : count);
}

template <typename T>
Call<T> make_call(const Options& o, const at::Tensor& student, const at::Tensor& teacher, const OptionalTensor& row_temperature,
                  const OptionalTensor& mask, const OptionalTensor& normalizer, std::vector<at::Tensor>& holder) {
  Call<T> call;
  call.options = o;
  call.x[kStudent] = student;
  call.x[kTeacher] = teacher;
  call.classes = student.size(o.dim);
  call.rows = student.numel() / call.classes;
  if (row_temperature) {
    call.temperature = row_numbers<T>(*row_temperature, holder);
    for (int64_t i = 0; i < call.rows; ++i)
      TORCH_CHECK_VALUE(call.temperature[i] > 0, "temperature must be > 0 everywhere, got ", call.temperature[i], " in row ", i);
  }
  if (mask) {
    holder.push_back(mask->contiguous());
    call.mask = holder.back().const_data_ptr<bool>();
  }
  call.weight = row_weight(o, call.classes, call.rows, call.mask, normalizer);
  call.streamed = student.nbytes() > (size_t(32) << 20);
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
std::tuple<at::Tensor, at::Tensor> forward(const Options& o, const at::Tensor& student, const at::Tensor& teacher,
                                           const OptionalTensor& row_temperature, const OptionalTensor& mask, const OptionalTensor& normalizer,
                                           bool save_grad) {
  std::vector<at::Tensor> holder;
  Call<T> call = make_call<T>(o, student, teacher, row_temperature, mask, normalizer, holder);
  const at::Tensor row_loss = at::empty(row_shape(student, o.dim), student.options().dtype(c10::CppTypeToScalarType<T>::value));
  const at::Tensor grad = save_grad ? empty_like_on_huge_pages(student) : at::empty({0}, student.options());
  call.row_loss = row_loss.mutable_data_ptr<T>();
  if (save_grad) call.x[kStudentGrad] = grad;
  if (call.rows > 0) run(call);
  return {reduce(call, row_loss), grad};
}

template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const Options& o, const at::Tensor& grad_loss, const at::Tensor& student,
                                                        const at::Tensor& teacher, const OptionalTensor& row_temperature,
                                                        const OptionalTensor& mask, const OptionalTensor& normalizer,
                                                        std::array<bool, 3> wanted) {
  std::vector<at::Tensor> holder;
  Call<T> call = make_call<T>(o, student, teacher, row_temperature, mask, normalizer, holder);
  const at::Tensor none = at::empty({0}, student.options());
  const at::Tensor to_student = wanted[0] ? empty_like_on_huge_pages(student) : none;
  const at::Tensor to_teacher = wanted[1] ? empty_like_on_huge_pages(teacher) : none;
  const at::Tensor to_temperature =
      wanted[2] ? at::empty(row_shape(student, o.dim), student.options().dtype(c10::CppTypeToScalarType<T>::value)) : none;
  if (wanted[0]) call.x[kStudentGrad] = to_student;
  if (wanted[1]) call.x[kTeacherGrad] = to_teacher;
  if (wanted[2]) call.temperature_grad = to_temperature.mutable_data_ptr<T>();
  if (o.reduction == Reduction::none)
    call.upstream = row_numbers<T>(grad_loss, holder);
  else
    call.weight *= grad_loss.item().toDouble();
  if (call.rows > 0) run(call);
  const bool cast = wanted[2] && row_temperature;
  return {to_student, to_teacher, cast ? to_temperature.to(row_temperature->scalar_type()) : to_temperature};
}

std::tuple<at::Tensor, at::Tensor> temperature_kl_cpu(const at::Tensor& student, const at::Tensor& teacher, double temperature,
                                                      const OptionalTensor& row_temperature, const OptionalTensor& mask,
                                                      const OptionalTensor& normalizer, int64_t dim, c10::string_view direction, double beta,
                                                      c10::string_view reduction, bool scale_by_t2, bool include_entropy, double target_eps,
                                                      bool save_grad) {
  const Options o = parse_options(student, temperature, dim, direction, beta, reduction, scale_by_t2, include_entropy, target_eps);
  check_inputs(student, teacher, row_temperature, mask, normalizer, o);
  const auto kernel = compute_dtype(student, teacher) == at::kDouble ? forward<double> : forward<float>;
  return kernel(o, student, teacher, row_temperature, mask, normalizer, save_grad);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> temperature_kl_backward_cpu(
    const at::Tensor& grad_loss, const at::Tensor& student, const at::Tensor& teacher, double temperature,
    const OptionalTensor& row_temperature, const OptionalTensor& mask, const OptionalTensor& normalizer, int64_t dim,
    c10::string_view direction, double beta, c10::string_view reduction, bool scale_by_t2, bool include_entropy, double target_eps,
    std::array<bool, 3> wanted) {
  const Options o = parse_options(student, temperature, dim, direction, beta, reduction, scale_by_t2, include_entropy, target_eps);
  check_inputs(student, teacher, row_temperature, mask, normalizer, o);
  if (o.reduction == Reduction::none)
    check_shape(grad_loss, "grad_loss", row_shape(student, o.dim));
  else
    check_shape(grad_loss, "grad_loss", {});
  const auto kernel = compute_dtype(student, teacher) == at::kDouble ? backward<double> : backward<float>;
  return kernel(o, grad_loss, student, teacher, row_temperature, mask, normalizer, wanted);
}

// The gradient of a mean or sum arrives as one number, nearly always 1: then nothing is to be done.
void temperature_kl_rescale_cpu(at::Tensor& grad, const at::Tensor& grad_loss, int64_t dim) {
  if (grad_loss.dim() > 0)
    grad.mul_(grad_loss.unsqueeze(dim));
  else if (grad_loss.item().toDouble() != 1)
    grad.mul_(grad_loss);
}

}  // namespace
}  // namespace kdkernels::temperature_kl

TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("temperature_kl", kdkernels::temperature_kl::temperature_kl_cpu);
  m.impl("temperature_kl_backward", kdkernels::temperature_kl::temperature_kl_backward_cpu);
  m.impl("temperature_kl_rescale_", kdkernels::temperature_kl::temperature_kl_rescale_cpu);
}
