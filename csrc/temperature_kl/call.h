// One call of temperature_kl, and the computation of one of its tiles.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>

#include "../common/memory.h"
#include "divergence.h"
#include "forms.h"
#include "jsd.h"
#include "layout.h"
#include "temperature_kl.h"
#include "tile.h"

namespace kdkernels::temperature_kl {

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
  explicit Scratch(int64_t tile) : size((tile + simd::kLanes<T> - 1) / simd::kLanes<T> * simd::kLanes<T>), storage(4 * size) {}
  int64_t size;
  WorkArray<T> storage, centred, widened, gradient;
  std::unique_ptr<Part<T>[]> parts{new Part<T>[size / (kPart * simd::kLanes<T>)+1]};
  T *weights = storage.get(), *difference = weights + size, *aux = difference + size, *aux2 = aux + size;
  PrefetchRange next_tile;

  // Memory for the centred logits of both networks, their logits in T, and a gradient, allocated on
  // first use because most tiles need none of them.
  T* centred_logits() {
    if (!centred) centred = WorkArray<T>(2 * size);
    return centred.get();
  }
  T* widened_logits() {
    if (!widened) widened = WorkArray<T>(2 * size);
    return widened.get();
  }
  T* gradient_row() {
    if (!gradient) gradient = WorkArray<T>(size);
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

// The plain divergences of two rows of at most kPart vectors, each with a scratch of its own.
template <typename T, typename Stored>
std::array<Divergence<T>, 2> divergences_of_two_rows(const Call<T>& call, const std::array<Source<T, Stored>, 2>& students,
                                                     const std::array<Source<T, Stored>, 2>& teachers,
                                                     const std::array<Vec<T>, 2>& temperatures,
                                                     const std::array<Scratch<T>*, 2>& scratches) {
  const bool from_teacher = call.options.direction != Direction::reverse;
  auto stages = [&](int i) {
    Scratch<T>& scratch = *scratches[i];
    return DivergenceStages<T, AcrossLanes, false, Source<T, Stored>>(
        from_teacher ? teachers[i] : students[i], from_teacher ? students[i] : teachers[i], temperatures[i], scratch.weights,
        scratch.difference, call.any_gradient_wanted(), {scratch.parts.get(), kPart}, scratch.next_tile);
  };
  auto first = stages(0), second = stages(1);
  first.weigh(0);
  second.weigh(0);
  first.add_terms(0);
  second.add_terms(0);
  return {first.finish(), second.finish()};
}

// Computes losses and gradients of one tile. `temperature` and `weight` are those of its rows. Only
// plain divergences may have logits that are stored in another type than T. computed: the divergence,
// if it has been computed with the same scratch, or null.
template <typename T, typename Reduce, typename Stored = T>
ValueAndDerivative<T> run_tile(const Call<T>& call, const Source<T, Stored>& student, const Source<T, Stored>& teacher, Vec<T> temperature,
                               Vec<T> weight, const Sink<T>* student_out, const Sink<T>* teacher_out, Scratch<T>& scratch,
                               const Divergence<T>* computed = nullptr) {
  const Options& o = call.options;
  const bool jsd = o.direction == Direction::jsd, from_teacher = o.direction != Direction::reverse;
  const Sink<T>*base_out = from_teacher ? teacher_out : student_out, *other_out = from_teacher ? student_out : teacher_out;
  const bool wants_temperature_grad = call.temperature_grad != nullptr;
  const bool use_general_form = !jsd && !is_plain_divergence(call);
  const Vec<T> scale = weight * (o.scale_by_t2 ? temperature : T(1) / temperature);
  const T far_threshold = jsd ? T(kFarDivergence) : std::numeric_limits<T>::infinity();
  T* difference = scratch.difference;

  // Only a plain divergence of one long row is computed in parts.
  Parts<T> parts{scratch.parts.get(), std::is_same_v<Reduce, AcrossLanes> && !jsd && !use_general_form ? kPart : student.vectors()};

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
    if (other_out) write_other_gradient<T>(s, parts, base.vectors(), scratch.weights, difference, scale, *other_out);
    if (base_out) write_base_gradient<T>(s, base, other, scratch.weights, scale, *base_out);
    return {s.kl, Vec<T>{}, s.remaining_factor};
  };

  const auto &base = from_teacher ? teacher : student, &other = from_teacher ? student : teacher;
  const bool keeps_all = call.any_gradient_wanted() || jsd || use_general_form;
  auto compute = [&] {
    return DivergenceStages<T, Reduce, false, Source<T, Stored>>(base, other, temperature, scratch.weights, difference, keeps_all, parts,
                                                                 scratch.next_tile, far_threshold)
        .run();
  };
  Divergence<T> s = computed ? *computed : compute();
  if (__builtin_expect(s.has_far_centres && !any(needs_centring<T>(s)), 0)) {
    parts.vectors = base.vectors();
    s = compute();
  }
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
    parts.vectors = base.vectors();
    DivergenceStages<T, Reduce, true, Source<T>> stages(base_source, other_source, temperature * T(kQuarter), scratch.weights, difference,
                                                        keeps_all, parts, {}, far_threshold);
    result = finish(stages.run(), base_source, other_source);
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

}  // namespace kdkernels::temperature_kl
