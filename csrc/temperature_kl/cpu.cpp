// CPU kernels of the temperature_kl ops. Compiled once per instruction set.
#include "temperature_kl.h"

#include <ATen/Parallel.h>
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
#include "divergence.h"
#include "forms.h"
#include "jsd.h"
#include "layout.h"
#include "tile.h"

namespace kdkernels::temperature_kl {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// One call: operands in kernel layout and one number per row, all indexed by the logical row.
template <typename T>
struct Call {
  Options options;
  std::array<at::Tensor, kOperands> x;  // the gradients are undefined where they are not wanted
  std::array<Element, kOperands> element{};
  int64_t classes = 0, rows = 0;
  const T* temperature = nullptr;  // per row, or null
  const bool* mask = nullptr;
  const T* upstream = nullptr;  // dLoss / dRow before `weight`, or null for 1
  double weight = 1;            // of a row in the loss
  T* row_loss = nullptr;        // unweighted, or null
  T* temperature_grad = nullptr;
  float* row_scale = nullptr;  // if not null: the student's gradient is written divided by a power of two, which goes here
  bool streamed = false;

  bool wants(Operand k) const { return x[k].defined(); }
  bool gradients() const { return wants(kStudentGrad) || wants(kTeacherGrad) || temperature_grad; }
  bool kept(int64_t row) const { return !mask || mask[row]; }
  T row_temperature(int64_t row) const { return temperature ? temperature[row] : static_cast<T>(options.temperature); }
  T row_weight(int64_t row) const { return static_cast<T>(weight) * (upstream ? upstream[row] : T(1)); }
};

// What the stages of a tile hand on to one another, for one thread.
template <typename T>
struct Scratch {
  explicit Scratch(int64_t tile) : size((tile + simd::kLanes<T> - 1) / simd::kLanes<T> * simd::kLanes<T>), storage(new T[4 * size]) {}
  int64_t size;
  std::unique_ptr<T[]> storage, centred, gradient;
  T *e = storage.get(), *gap = e + size, *aux = gap + size, *aux2 = aux + size;
  Ahead ahead;

  // Room for the centred logits of both nets, and for a gradient: most tiles need neither.
  T* centred_logits() {
    if (!centred) centred.reset(new T[2 * size]);
    return centred.get();
  }
  T* gradient_row() {
    if (!gradient) gradient.reset(new T[size]);
    return gradient.get();
  }
};

// Nets that disagree by more than this have no digits of the Jensen-Shannon divergence to lose to cancellation, and log-sum-exps of centred
// logits lose fewer than the centred form, whose terms grow with the divergence.
constexpr int kDisagree = 1;

// Losses and gradients of one tile. `temperature` and `weight` are those of its rows.
template <typename T, typename Reduce>
ValueAndSlope<T> run_tile(const Call<T>& call, const Source<T>& student, const Source<T>& teacher, Vec<T> temperature, Vec<T> weight,
                          const Sink<T>* student_out, const Sink<T>* teacher_out, Scratch<T>& scratch) {
  const Options& o = call.options;
  const bool jsd = o.direction == Direction::jsd, from_teacher = o.direction != Direction::reverse;
  const Sink<T>*base_out = from_teacher ? teacher_out : student_out, *other_out = from_teacher ? student_out : teacher_out;
  const bool slope = call.temperature_grad != nullptr;
  const bool general = slope || !o.include_entropy || o.target_eps > 0;
  const Vec<T> scale = weight * (o.scale_by_t2 ? temperature : T(1) / temperature);
  const T disagree = jsd ? T(kDisagree) : std::numeric_limits<T>::infinity();
  T* gap = !jsd && (other_out || general) ? scratch.gap : nullptr;

  auto finish = [&](const Divergence<T>& s, const Source<T>& base, const Source<T>& other) -> ValueAndSlope<T> {
    if (jsd)
      return Jsd<T>(o.beta).template operator()<Reduce>(s, base, other, scratch.e, scratch.gap, scratch.aux, scratch.aux2, scale,
                                                        call.gradients(), base_out, other_out);
    if (general) {
      const Form<T> form{static_cast<T>(o.target_eps), o.include_entropy, static_cast<T>(call.classes)};
      return general_form<T, Reduce>(s, base, other, scratch.e, gap, form, scale, call.gradients(), base_out, other_out);
    }
    if (other_out) write_other_gradient<T>(s, base.vectors(), scratch.e, gap, scale, *other_out);
    if (base_out) write_base_gradient<T>(s, base, other, scratch.e, scale, *base_out);
    return {s.kl, Vec<T>{}, s.rest};
  };

  const Source<T>&base = from_teacher ? teacher : student, &other = from_teacher ? student : teacher;
  const auto s = divergence<T, Reduce, false>(base, other, temperature, scratch.e, gap, scratch.ahead, disagree);
  Mask<T> which = needs_centring<T>(s);
  ValueAndSlope<T> result;
  if (__builtin_expect(!any(which), 1)) {
    result = finish(s, base, other);
    if (o.target_eps > 0) which = ~(result.value < std::numeric_limits<T>::infinity());  // it weighs classes without probability too
  }
  if (__builtin_expect(any(which), 0)) {
    // Rows that are not marked are computed again as they were.
    T *centred_base = scratch.centred_logits(), *centred_other = centred_base + scratch.size;
    centre<T, Reduce>(base, which, centred_base);
    centre<T, Reduce>(other, which, centred_other);
    const Source<T> b(centred_base, Element::native, base.count()), c(centred_other, Element::native, other.count());
    result = finish(divergence<T, Reduce, true>(b, c, temperature * T(kQuarter), scratch.e, gap, {}, disagree), b, c);
  }
  // T^2 V and its derivative 2 T V - T S, or V and -S / T.
  if (slope) {
    const T unit = T(kSlopeUnit), back = T(1) / unit;
    result.slope = o.scale_by_t2 ? (T(2) * unit * result.value - result.slope) * (result.rest * temperature)  // rest is 1 or 1 / T
                                 : -(result.slope * result.rest) / temperature;
    result.slope = (result.slope * weight) * back;
  }
  result.value *= o.scale_by_t2 ? (result.rest * temperature) * temperature : result.rest;
  return result;
}

// The power of two by which a row whose largest magnitude is `largest` is divided when it is saved in float16: the largest then lies in
// [2^14, 2^15), so that nothing overflows and what underflows is below 2^-38 of the largest.
inline float saved_row_scale(double largest) {
  if (!(largest > 0 && std::isfinite(largest))) return 1;
  int exponent;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0f, std::clamp(exponent - 15, -126, 126));
}

// Writes a gradient divided by the power of two that is returned.
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
  for (int64_t j = 0; j < vectors; ++j) out.put(j, simd::load<T>(gradient + j * lanes) * inverse);
  return scale;
}

// Rows [begin, end) whose classes are adjacent.
template <typename T>
void run_rows(const Call<T>& call, const Rows& layout, int64_t begin, int64_t end) {
  Scratch<T> scratch(call.classes);
  for (int64_t row = begin; row < end; ++row) {
    const auto offset = layout.offsets(row);
    auto at = [&](int k) { return static_cast<char*>(address(call.x[k])) + offset[k] * call.x[k].element_size(); };
    if (!call.kept(row)) {
      if (call.row_loss) call.row_loss[row] = 0;
      if (call.temperature_grad) call.temperature_grad[row] = 0;
      if (call.row_scale) call.row_scale[row] = 1;
      for (int k : {kStudentGrad, kTeacherGrad})
        if (call.wants(Operand(k))) std::memset(at(k), 0, call.classes * call.x[k].element_size());
      continue;
    }
    const Operand first_read = call.options.direction == Direction::reverse ? kStudent : kTeacher;
    if (row + 1 < end)
      scratch.ahead = {at(first_read) + (layout.offsets(row + 1)[first_read] - offset[first_read]) * call.x[first_read].element_size(),
                       call.classes * call.x[first_read].element_size() / 64};
    auto sink = [&](Operand k) { return Sink<T>(call.wants(k) ? at(k) : nullptr, call.element[k], call.classes, call.streamed); };
    const Source<T> student(at(kStudent), call.element[kStudent], call.classes),
        teacher(at(kTeacher), call.element[kTeacher], call.classes);
    const Sink<T> final_student = sink(kStudentGrad), to_teacher = sink(kTeacherGrad);
    const Sink<T> to_student = call.row_scale ? Sink<T>(scratch.gradient_row(), Element::native, call.classes, false) : final_student;
    const auto result = run_tile<T, AcrossLanes>(call, student, teacher, splat<T>(call.row_temperature(row)),
                                                 splat<T>(call.row_weight(row)), call.wants(kStudentGrad) ? &to_student : nullptr,
                                                 call.wants(kTeacherGrad) ? &to_teacher : nullptr, scratch);
    if (call.row_scale) call.row_scale[row] = write_scaled(scratch.gradient_row(), call.classes, final_student);
    if (call.row_loss) call.row_loss[row] = result.value[0];
    if (call.temperature_grad) call.temperature_grad[row] = result.slope[0];
  }
  if (call.streamed) simd::fence();
}

// Adjacent rows are worked on a vector at a time, from copies [vector][class][lane]: the classes of a map can lie a power of two apart in
// memory, where they would evict one another from the cache. Several vectors are copied at once, to move whole runs of a class.
template <typename T>
class LaneTiles {
 public:
  static constexpr int lanes = simd::kLanes<T>;

  LaneTiles(const Call<T>& call, const Rows& layout)
      : call_(call),
        layout_(layout),
        tile_(call.classes * lanes),
        width_(lanes * std::clamp<int64_t>((int64_t(16) << 10) / (call.classes * simd::kBytes), 1, 8)),
        chunks_((layout.run() + width_ - 1) / width_) {}

  int64_t count() const { return call_.rows / layout_.run() * chunks_; }
  int64_t logits_per_chunk() const { return width_ * call_.classes; }

  void operator()(int64_t begin, int64_t end) const {
    Scratch<T> scratch(tile_);
    const std::unique_ptr<T[]> copies(new T[kOperands * logits_per_chunk()]());  // zeros: lanes past the end of a run compute on them
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / chunks_ * layout_.run() + i % chunks_ * width_;
      const int64_t count = std::min(width_, layout_.run() - i % chunks_ * width_);
      const auto offset = layout_.offsets(first);
      for (int k : {kStudent, kTeacher}) move<true>(k, offset[k], count, copy(copies, k));
      for (int64_t v = 0; v * lanes < count; ++v)
        run_vector(copies, v, first + v * lanes, std::min<int64_t>(lanes, count - v * lanes), scratch);
      for (int k : {kStudentGrad, kTeacherGrad})
        if (call_.wants(Operand(k))) move<false>(k, offset[k], count, copy(copies, k));
    }
  }

 private:
  T* copy(const std::unique_ptr<T[]>& copies, int k) const { return copies.get() + k * logits_per_chunk(); }

  // Copies `count` adjacent rows into tiles, or out of them.
  template <bool in>
  void move(int k, int64_t offset, int64_t count, T* tiles) const {
    const at::Tensor& x = call_.x[k];
    auto typed = [&](auto* memory) {
      memory += offset;
      const int64_t stride = x.stride(call_.options.dim), full = count / lanes, rest = count % lanes;
      for (int64_t j = 0; j < call_.classes; ++j, memory += stride) {
        for (int64_t v = 0; v < full; ++v) {
          if constexpr (in)
            convert(memory + v * lanes, tiles + v * tile_ + j * lanes, lanes);
          else
            convert(tiles + v * tile_ + j * lanes, memory + v * lanes, lanes);
        }
        if (rest == 0) continue;
        if constexpr (in)
          convert(memory + full * lanes, tiles + full * tile_ + j * lanes, rest);
        else
          convert(tiles + full * tile_ + j * lanes, memory + full * lanes, rest);
      }
    };
    if (call_.element[k] == Element::native) return typed(static_cast<T*>(address(x)));
    if (call_.element[k] == Element::bfloat16) return typed(static_cast<c10::BFloat16*>(address(x)));
    if (call_.element[k] == Element::half) return typed(static_cast<c10::Half*>(address(x)));
  }

  void run_vector(const std::unique_ptr<T[]>& copies, int64_t v, int64_t row, int here, Scratch<T>& scratch) const {
    std::array<T*, kOperands> at;
    for (int k = 0; k < kOperands; ++k) at[k] = copy(copies, k) + v * tile_;
    Vec<T> temperature = splat<T>(call_.row_temperature(row)), weight = splat<T>(call_.row_weight(row));
    for (int l = 0; l < here && (call_.temperature || call_.upstream); ++l) {
      temperature[l] = call_.row_temperature(row + l);
      weight[l] = call_.row_weight(row + l);
    }
    // A masked row takes part with equal nets, so that not even its NaN reaches a result, and its results are zeroed.
    for (int l = 0; l < here && call_.mask; ++l)
      if (!call_.kept(row + l)) clear_lane(at[kStudent], l), clear_lane(at[kTeacher], l);
    const Source<T> student(at[kStudent], Element::native, tile_), teacher(at[kTeacher], Element::native, tile_);
    const Sink<T> to_student(at[kStudentGrad], Element::native, tile_, false), to_teacher(at[kTeacherGrad], Element::native, tile_, false);
    const auto result =
        run_tile<T, PerLane>(call_, student, teacher, temperature, weight, call_.wants(kStudentGrad) ? &to_student : nullptr,
                             call_.wants(kTeacherGrad) ? &to_teacher : nullptr, scratch);
    for (int l = 0; l < here; ++l) {
      const bool kept = call_.kept(row + l);
      if (call_.row_loss) call_.row_loss[row + l] = kept ? result.value[l] : T(0);
      if (call_.temperature_grad) call_.temperature_grad[row + l] = kept ? result.slope[l] : T(0);
      if (!kept) clear_lane(at[kStudentGrad], l), clear_lane(at[kTeacherGrad], l);
    }
    if (call_.row_scale) scale_rows(at[kStudentGrad], call_.row_scale + row, here);
  }

  // Divides the rows of a gradient by powers of two.
  void scale_rows(T* tile, float* row_scale, int here) const {
    Vec<T> largest{}, inverse{};
    for (int64_t j = 0; j < call_.classes; ++j) {
      const Vec<T> g = simd::load<T>(tile + j * lanes);
      largest = simd::max(g < T(0) ? -g : g, largest);
    }
    for (int l = 0; l < here; ++l) {
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
  int64_t tile_, width_, chunks_;
};

template <typename T>
void run(Call<T>& call) {
  const int64_t dim = call.options.dim;
  const bool per_lane = !classes_adjacent(call.x[kStudent], dim) && rows_adjacent(call.x[kStudent], dim);
  const std::array<at::Tensor, kOperands> wanted = call.x;
  for (int k = 0; k < kOperands; ++k) {
    at::Tensor& x = call.x[k];
    if (!x.defined()) continue;
    // Converted first: a converted tensor has strides of its own, where the operand's dimensions overlap.
    if (element_of<T>(x.scalar_type()) == Element::other) x = x.to(c10::CppTypeToScalarType<T>::value);
    x = per_lane ? with_rows_adjacent(x, dim) : with_classes_adjacent(x, dim);
    call.element[k] = element_of<T>(x.scalar_type());
  }
  const Rows layout(call.x, dim);
  constexpr int64_t grain = 1 << 14;  // logits below which a second thread costs more than it brings
  if (per_lane) {
    const LaneTiles<T> tiles(call, layout);
    at::parallel_for(0, tiles.count(), std::max<int64_t>(1, grain / tiles.logits_per_chunk()), tiles);
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
  TORCH_CHECK_VALUE(!normalizer || (count > 0 && std::isfinite(count)), "normalizer must be a finite number > 0, got ", count);
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
      TORCH_CHECK_VALUE(call.temperature[i] > 0 && std::isfinite(call.temperature[i]),
                        "temperature must be finite and > 0 everywhere, got ", call.temperature[i], " in row ", i);
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
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const Options& o, const at::Tensor& student, const at::Tensor& teacher,
                                                       const OptionalTensor& row_temperature, const OptionalTensor& mask,
                                                       const OptionalTensor& normalizer, bool save_grad) {
  std::vector<at::Tensor> holder;
  Call<T> call = make_call<T>(o, student, teacher, row_temperature, mask, normalizer, holder);
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
  std::vector<at::Tensor> holder;
  Call<T> call = make_call<T>(o, student, teacher, row_temperature, mask, normalizer, holder);
  const at::Tensor none = at::empty({0}, student.options());
  const at::Tensor to_student = wanted[0] ? recycled_empty_like(student) : none;
  const at::Tensor to_teacher = wanted[1] ? recycled_empty_like(teacher) : none;
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

// out = grad * scale * upstream, multiplied in T and rounded once. All have the shape of grad. The two factors meet the gradient one after
// the other, because their product may leave the range of T where the result does not.
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
      const int64_t here = std::min(block, count - begin);
      char* to = data[0] + begin * strides[0];
      const char *from = data[1] + begin * strides[1], *scales = data[2] + begin * strides[2], *factors = data[3] + begin * strides[3];
      auto number = [](const char* p) { return *reinterpret_cast<const T*>(p); };
      if (dense)
        convert(reinterpret_cast<const Number*>(from), numbers, here);
      else
        for (int64_t i = 0; i < here; ++i) numbers[i] = static_cast<T>(*reinterpret_cast<const Number*>(from + i * strides[1]));
      if (strides[2] == 0 && strides[3] == 0) {
        const T first = number(scales), second = number(factors);
        for (int64_t i = 0; i < here; ++i) numbers[i] = numbers[i] * first * second;
      } else {
        for (int64_t i = 0; i < here; ++i) numbers[i] = numbers[i] * number(scales + i * strides[2]) * number(factors + i * strides[3]);
      }
      if (dense)
        convert(numbers, reinterpret_cast<Number*>(to), here);
      else
        for (int64_t i = 0; i < here; ++i) *reinterpret_cast<Number*>(to + i * strides[0]) = static_cast<Number>(numbers[i]);
    }
  });
}

void rescale(const at::Tensor& out, const at::Tensor& grad, const at::Tensor& row_scale, const at::Tensor& grad_loss,
             const OptionalTensor& mask, int64_t dim) {
  if (grad.numel() == 0) return;
  const at::ScalarType dtype = grad.scalar_type();
  const at::ScalarType compute = dtype == at::kDouble || grad_loss.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto rows = row_shape(grad, dim);
  auto spread = [&](const at::Tensor& x) { return (x.dim() == 0 ? x : x.unsqueeze(dim)).expand_as(grad); };
  at::Tensor upstream = grad_loss.to(compute);
  if (mask && !at::isfinite(upstream).all().item().toBool())  // 0 * inf is no 0
    upstream = at::where(*mask, upstream, at::zeros({}, upstream.options()));
  const at::Tensor scale = row_scale.sizes() == at::IntArrayRef(rows) ? row_scale.to(compute) : at::ones({}, upstream.options());
  auto with = [&](auto number) {
    using Number = decltype(number);
    if (compute == at::kDouble)
      multiply<Number, double>(out, grad, spread(scale), spread(upstream));
    else if constexpr (!std::is_same_v<Number, double>)
      multiply<Number, float>(out, grad, spread(scale), spread(upstream));
  };
  if (dtype == at::kDouble) return with(double());
  if (dtype == at::kFloat) return with(float());
  if (dtype == at::kBFloat16) return with(c10::BFloat16());
  return with(c10::Half());
}

// The gradient of a mean or sum arrives as one number, nearly always 1: then nothing is to be done but for scaled rows.
bool is_one(const at::Tensor& row_scale, const at::Tensor& grad_loss) {
  return row_scale.numel() == 0 && grad_loss.dim() == 0 && grad_loss.item().toDouble() == 1;
}

at::Tensor temperature_kl_rescale_cpu(const at::Tensor& grad, const at::Tensor& row_scale, const at::Tensor& grad_loss,
                                      const OptionalTensor& mask, int64_t dim) {
  check_rescale(grad, row_scale, grad_loss, mask, dim);
  if (is_one(row_scale, grad_loss)) return grad.clone();
  at::Tensor out = recycled_empty_like(grad);
  rescale(out, grad, row_scale, grad_loss, mask, dim < 0 ? dim + grad.dim() : dim);
  return out;
}

void temperature_kl_rescale_in_place_cpu(at::Tensor& grad, const at::Tensor& row_scale, const at::Tensor& grad_loss,
                                         const OptionalTensor& mask, int64_t dim) {
  check_rescale(grad, row_scale, grad_loss, mask, dim);
  if (!is_one(row_scale, grad_loss)) rescale(grad, grad, row_scale, grad_loss, mask, dim < 0 ? dim + grad.dim() : dim);
}

}  // namespace
}  // namespace kdkernels::temperature_kl

TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("temperature_kl", kdkernels::temperature_kl::temperature_kl_cpu);
  m.impl("temperature_kl_backward", kdkernels::temperature_kl::temperature_kl_backward_cpu);
  m.impl("temperature_kl_rescale", kdkernels::temperature_kl::temperature_kl_rescale_cpu);
  m.impl("temperature_kl_rescale_", kdkernels::temperature_kl::temperature_kl_rescale_in_place_cpu);
}
