// CPU kernels of the attention_pool and attention_transfer_loss ops, compiled once per instruction
// set.
#include "attention_pool.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include "../common/convert.h"
#include "../common/memory.h"
#include "../common/parallel.h"
#include "maps.h"
#include "scatter.h"

namespace kdkernels::attention_pool {
namespace {

constexpr int64_t kGrain = 1 << 14;  // with fewer numbers per thread, a second thread costs more than it saves

// The features of one network, with the functions that compute its map and its gradient.
template <typename T>
class PooledFeatures {
 public:
  PooledFeatures(const at::Tensor& x, const Options& options)
      : original_(x),
        features_(view(x.scalar_type() != at::kDouble && std::is_same_v<T, double> ? x.to(at::kDouble) : x)),
        options_(options) {}

  bool uses_max() const { return options_.reduce == Reduce::max; }
  int64_t batch() const { return features_.batch; }
  int64_t positions() const { return features_.positions; }
  int64_t elements_per_sample() const { return features_.channels * features_.positions; }
  // dMap/dx is |x|^(p-1) sign(x) times this factor.
  double factor() const { return options_.p / (options_.reduce == Reduce::mean ? static_cast<double>(features_.channels) : 1); }

  // An upper bound of |dL/dx| in one sample, from its map q * divisor and the weights of its
  // positions. |x|^(p-1) is largest if a single channel contributes the whole map or, for p < 1, if
  // x is the smallest positive half-precision number.
  double gradient_bound(const T* q, double divisor, const T* weight) const {
    const double p = options_.p, count = options_.reduce == Reduce::mean ? static_cast<double>(features_.channels) : 1;
    const double max_derivative = p < 1 ? std::pow(0x1p-24, p - 1) : 0;
    double bound = 0;
    for (int64_t i = 0; i < features_.positions; ++i) {
      const double derivative = p < 1    ? max_derivative
                                : p == 2 ? std::sqrt(q[i] * divisor * count)
                                         : std::pow(q[i] * divisor * count, 1 - 1 / p);
      const double magnitude = std::abs(static_cast<double>(weight[i])) * derivative;
      if (!(magnitude <= bound)) bound = magnitude;
    }
    return bound;
  }

  // Computes the map of sample b at positions [first, first + count).
  void pool_part(int64_t b, int64_t first, int64_t count, T* map, int32_t* channel) const {
    with_storage<T>(features_.x.scalar_type(), [&](auto* type) {
      using Storage = std::remove_pointer_t<decltype(type)>;
      with_power<T>(options_.p, [&](const auto& power) {
        pool(part(count), position_address<const Storage>(features_, b, first), uses_max(), options_.reduce == Reduce::mean, power, map,
             channel);
      });
    });
  }

  // Allocates the tensor for the gradient, in the memory layout of the features.
  void make_gradient() {
    gradient_ = recycled_empty_like(original_);
    auto gradient_view =
        gradient_.scalar_type() == features_.x.scalar_type() ? view_as(gradient_, features_.channels_adjacent) : std::nullopt;
    if (!gradient_view) {
      const auto options = features_.x.options().memory_format(at::MemoryFormat::Contiguous);
      gradient_view = view_as(
          features_.channels_adjacent
              ? at::empty({features_.batch, features_.positions, features_.channels}, options).transpose(1, 2).view(features_.x.sizes())
              : at::empty(features_.x.sizes(), options),
          features_.channels_adjacent);
    }
    gradient_features_ = *gradient_view;
    written_ = gradient_features_.x;
    const int64_t row_size = features_.channels_adjacent ? features_.channels : features_.positions;
    const bool aligned = row_size * features_.x.element_size() % simd::kBytes == 0 &&
                         reinterpret_cast<uintptr_t>(address(gradient_features_.x)) % simd::kBytes == 0;
    streaming_ = aligned && bypasses_caches(original_.nbytes());
  }

  void scatter_part(int64_t b, int64_t first, int64_t count, const T* weight, const int32_t* channel) const {
    with_storage<T>(features_.x.scalar_type(), [&](auto* type) {
      using Storage = std::remove_pointer_t<decltype(type)>;
      with_power<T>(options_.p, [&](const auto& power) {
        Features to = gradient_features_;
        to.positions = count;
        const bool streaming = streaming_ && (features_.channels_adjacent || count == features_.positions);
        scatter(part(count), position_address<const Storage>(features_, b, first), to, uses_max(), streaming, power, weight, channel,
                position_address<Storage>(gradient_features_, b, first));
      });
    });
  }

  at::Tensor finish_gradient() const {
    simd::fence();
    if (!written_.is_same(gradient_)) gradient_.copy_(written_);
    return gradient_;
  }

 private:
  Features part(int64_t count) const {
    Features result = features_;
    result.positions = count;
    return result;
  }
  template <typename Storage>
  static Storage* position_address(const Features& layout, int64_t b, int64_t first) {
    return layout.template sample<std::remove_const_t<Storage>>(b) + first * (layout.channels_adjacent ? layout.stride : 1);
  }

  at::Tensor original_, gradient_, written_;
  Features features_, gradient_features_;
  Options options_;
  bool streaming_ = false;
};

// The exponent of the power of two that scales numbers of magnitude up to `bound` to the top of the
// float16 range, with one spare bit for rounding errors.
inline int half_exponent(double bound) {
  int exponent = 15;
  if (bound > 0 && std::isfinite(bound)) std::frexp(bound, &exponent);
  return std::clamp(15 - exponent, -100, 100);
}

// Per-sample arrays that one stage passes to the next, either for all samples or only for the
// sample that a thread is working on.
template <typename T>
struct Scratch {
  Scratch(int64_t samples, int64_t positions, int arrays, int channels)
      : values(samples * positions * arrays + simd::kLanes<T>), indices(samples * positions * channels), stride(positions) {}
  T* array(int i, int64_t sample, int64_t samples) const { return values.get() + (i * samples + sample) * stride; }
  int32_t* channel(int i, int64_t sample, int64_t samples) const { return indices.get() + (i * samples + sample) * stride; }
  WorkArray<T> values;
  WorkArray<int32_t> indices;
  int64_t stride;
};

// Runs pool(b, first, count, slot), finish(b, slot) and scatter(b, first, count, slot) for all
// samples. One thread processes a whole sample, so that its features are still in a cache when the
// gradient reads them again. Only if there are fewer samples than threads, the positions of a
// sample are divided among threads, stage by stage. `slot` is the index of the sample in `scratch`,
// which has slots() slots.
class Schedule {
 public:
  Schedule(int64_t batch, int64_t positions, int64_t elements_per_sample)
      : batch_(batch), positions_(positions), elements_per_sample_(elements_per_sample) {
    const int64_t threads = at::get_num_threads();
    samples_are_split_ = batch > 0 && batch < threads && elements_per_sample >= 4 * kGrain && positions >= 128;
    parts_per_sample_ = samples_are_split_ ? std::min<int64_t>((threads + batch - 1) / batch, positions / 64) : 1;
  }
  int64_t slots() const { return samples_are_split_ ? batch_ : 1; }

  template <typename MakeScratch, typename Pool, typename Finish, typename Scatter>
  void run(MakeScratch&& make_scratch, Pool&& pool, Finish&& finish, Scatter&& scatter) const {
    if (!samples_are_split_) {
      const int64_t grain = std::max<int64_t>(1, kGrain / elements_per_sample_);
      parallel_for(0, batch_, grain, make_scratch, [&](const auto& scratch, int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          pool(scratch, b, 0, positions_, 0);
          finish(scratch, b, 0);
          scatter(scratch, b, 0, positions_, 0);
        }
        simd::fence();
      });
      return;
    }
    const auto scratch = make_scratch();
    auto for_each_part = [&](auto&& stage) {
      parallel_for(0, batch_ * parts_per_sample_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / parts_per_sample_, k = i % parts_per_sample_, first = boundary(k), count = boundary(k + 1) - first;
          stage(scratch, b, first, count, b);
        }
        simd::fence();
      });
    };
    for_each_part(pool);
    parallel_for(0, batch_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) finish(scratch, b, b);
    });
    for_each_part(scatter);
  }

 private:
  int64_t boundary(int64_t k) const { return k == parts_per_sample_ ? positions_ : positions_ * k / parts_per_sample_ / 16 * 16; }
  int64_t batch_, positions_, elements_per_sample_, parts_per_sample_;
  bool samples_are_split_;
};

template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> pool_forward(const at::Tensor& x, const Options& o, Normalize normalize) {
  const PooledFeatures<T> network(x, o);
  const at::Tensor maps = recycled_empty(map_shape(x), c10::CppTypeToScalarType<T>::value);
  const at::Tensor norm = at::empty({normalize == Normalize::l2 ? network.batch() : 0}, x.options().dtype(at::kDouble));
  const at::Tensor channel =
      network.uses_max() ? at::empty(map_shape(x), x.options().dtype(at::kInt)) : at::empty({0}, x.options().dtype(at::kInt));
  T* map = maps.mutable_data_ptr<T>();
  int32_t* channels = network.uses_max() ? channel.mutable_data_ptr<int32_t>() : nullptr;
  const int64_t positions = network.positions();
  Schedule(network.batch(), positions, network.elements_per_sample())
      .run([] { return 0; },
           [&](int, int64_t b, int64_t first, int64_t count, int64_t) {
             network.pool_part(b, first, count, map + b * positions + first, channels ? channels + b * positions + first : nullptr);
           },
           [&](int, int64_t b, int64_t) {
             T* a = map + b * positions;
             if (normalize == Normalize::l2) {
               const L2<T> l2(a, positions, o.eps);
               norm.mutable_data_ptr<double>()[b] = l2.norm;
               l2.normalize(a, positions, a);
             } else if (normalize == Normalize::softmax) {
               softmax(a, positions, a);
             }
           },
           [](int, int64_t, int64_t, int64_t, int64_t) {});
  return {maps, norm, channel};
}

template <typename T>
at::Tensor pool_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& maps, const at::Tensor& norm,
                         const at::Tensor& channel, const Options& o, Normalize normalize) {
  PooledFeatures<T> network(x, o);
  network.make_gradient();
  const at::Tensor upstream = grad.to(c10::CppTypeToScalarType<T>::value).contiguous(), q = maps.contiguous();
  const T *g = upstream.const_data_ptr<T>(), *map = q.const_data_ptr<T>();
  const int32_t* channels = network.uses_max() ? channel.const_data_ptr<int32_t>() : nullptr;
  const int64_t positions = network.positions();
  const Schedule schedule(network.batch(), positions, network.elements_per_sample());
  const double factor = network.factor();
  schedule.run([&] { return Scratch<T>(schedule.slots(), positions, 1, 0); }, [](const Scratch<T>&, int64_t, int64_t, int64_t, int64_t) {},
               [&](const Scratch<T>& scratch, int64_t b, int64_t slot) {
                 T* weight = scratch.array(0, slot, schedule.slots());
                 const T *sample_map = map + b * positions, *sample_grad = g + b * positions;
                 if (normalize == Normalize::l2)
                   L2<T>(norm.const_data_ptr<double>()[b], o.eps).backward(sample_map, sample_grad, positions, factor, weight);
                 else if (normalize == Normalize::softmax)
                   softmax_backward(sample_map, sample_grad, positions, factor, weight);
                 else
                   for (int64_t s = 0; s < positions; ++s) weight[s] = sample_grad[s] * static_cast<T>(factor);
               },
               [&](const Scratch<T>& scratch, int64_t b, int64_t first, int64_t count, int64_t slot) {
                 network.scatter_part(b, first, count, scratch.array(0, slot, schedule.slots()) + first,
                                      channels ? channels + b * positions + first : nullptr);
               });
  return network.finish_gradient();
}

// Computes the loss, and those gradients of the loss times `upstream` that are wanted.
//
// sample_scale [B] and teacher_map [B, positions] are written if they are not null. sample_scale is
// used for a float16 student, whose gradient is written divided by it.
template <typename T>
double transfer_loss(PooledFeatures<T>& student, PooledFeatures<T>& teacher, const Options& o, Variant variant, double upstream,
                     std::array<bool, 2> wanted, float* sample_scale, T* teacher_map) {
  const int64_t batch = student.batch(), positions = student.positions();
  PooledFeatures<T>* const networks[2] = {&student, &teacher};
  for (int i = 0; i < 2; ++i)
    if (wanted[i]) networks[i]->make_gradient();
  const Schedule schedule(batch, positions, student.elements_per_sample() + teacher.elements_per_sample());
  const int64_t slots = schedule.slots();
  std::vector<double> losses(batch);
  enum { kDifference = 2, kWeight, kArrays = kWeight + 2 };  // arrays 0 and 1 are the maps
  schedule.run([&] { return Scratch<T>(slots, positions, kArrays, student.uses_max() ? 2 : 0); },
               [&](const Scratch<T>& scratch, int64_t b, int64_t first, int64_t count, int64_t slot) {
                 for (int i = 1; i >= 0; --i)  // the student last, because it is read again
                   networks[i]->pool_part(b, first, count, scratch.array(i, slot, slots) + first,
                                          student.uses_max() ? scratch.channel(i, slot, slots) + first : nullptr);
               },
               [&](const Scratch<T>& scratch, int64_t b, int64_t slot) {
                 T *qs = scratch.array(0, slot, slots), *qt = scratch.array(1, slot, slots), *d = scratch.array(kDifference, slot, slots);
                 const L2<T> s(qs, positions, o.eps), t(qt, positions, o.eps);
                 if (teacher_map) std::copy_n(qt, positions, teacher_map + b * positions);
                 const double norm = difference_norm(qs, qt, s.divisor(), t.divisor(), positions, wanted, d);
                 losses[b] = variant == Variant::authors ? norm * norm / static_cast<double>(positions) : norm;
                 if (!wanted[0] && !wanted[1]) return;
                 // The gradient of |d| is d / |d|. It is divided here, because 1 / |d| may leave the range of
                 // T.
                 if (variant == Variant::paper && norm > 0)
                   for (int64_t i = 0; i < positions; ++i) d[i] = static_cast<T>(d[i] / norm);
                 const double loss_derivative = variant == Variant::authors ? 2 / static_cast<double>(positions) : norm == norm ? 1 : norm;
                 const double scale = upstream * loss_derivative / static_cast<double>(batch);
                 T* const weight = scratch.array(kWeight, slot, slots);
                 if (wanted[0]) s.backward(qs, d, positions, scale * student.factor(), weight);
                 if (sample_scale) {
                   const int exponent = half_exponent(student.gradient_bound(qs, s.divisor(), weight));
                   sample_scale[b] = std::ldexp(1.0f, -exponent);
                   for (int64_t i = 0; i < positions; ++i) weight[i] = std::ldexp(weight[i], exponent);
                 }
                 if (wanted[1]) t.backward(qt, d, positions, -scale * teacher.factor(), scratch.array(kWeight + 1, slot, slots));
               },
               [&](const Scratch<T>& scratch, int64_t b, int64_t first, int64_t count, int64_t slot) {
                 for (int i = 0; i < 2; ++i)
                   if (wanted[i])
                     networks[i]->scatter_part(b, first, count, scratch.array(kWeight + i, slot, slots) + first,
                                               student.uses_max() ? scratch.channel(i, slot, slots) + first : nullptr);
               });
  double total = 0;
  for (double loss : losses) total += loss;
  return batch > 0 ? total / static_cast<double>(batch) : 0;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_pool_cpu(const at::Tensor& x, double p, int64_t reduce, int64_t normalize,
                                                                  double eps) {
  check_features(x, "x");
  const auto kernel = compute_dtype(x) == at::kDouble ? pool_forward<double> : pool_forward<float>;
  return kernel(x, parse_options(p, reduce, eps), parse_normalize(normalize));
}

at::Tensor attention_pool_backward_cpu(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& maps, const at::Tensor& norm,
                                       const at::Tensor& channel, double p, int64_t reduce, int64_t normalize, double eps) {
  check_features(x, "x");
  const Options o = parse_options(p, reduce, eps);
  const Normalize normalized = parse_normalize(normalize);
  check_floating(grad, "grad");
  check_shape(grad, "grad", map_shape(x));
  check_shape(maps, "maps", map_shape(x));
  TORCH_CHECK_TYPE(maps.scalar_type() == compute_dtype(x), "maps must be ", compute_dtype(x), ", got ", maps.scalar_type());
  if (normalized == Normalize::l2) {
    check_shape(norm, "norm", {x.size(0)});
    TORCH_CHECK_TYPE(norm.scalar_type() == at::kDouble && norm.is_contiguous(), "norm must be contiguous float64");
  }
  if (o.reduce == Reduce::max) {
    check_shape(channel, "channel", map_shape(x));
    TORCH_CHECK_TYPE(channel.scalar_type() == at::kInt && channel.is_contiguous(), "channel must be contiguous int32");
    const int32_t* channels = channel.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < channel.numel(); ++i)
      TORCH_CHECK_VALUE(channels[i] >= 0 && channels[i] < x.size(1), "channel must lie in [0, ", x.size(1), "), got ", channels[i]);
  }
  const auto kernel = compute_dtype(x) == at::kDouble ? pool_backward<double> : pool_backward<float>;
  return kernel(grad, x, maps, norm, channel, o, normalized);
}

// p[i] *= factor, multiplied in float and rounded once.
template <typename Half>
void scale_in_place(Half* p, int64_t count, float factor) {
  constexpr int64_t lanes = simd::kLanes<float>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) narrow(widen(p + i) * factor, p + i);
  for (; i < count; ++i) p[i] = static_cast<Half>(static_cast<float>(p[i]) * factor);
}

void scale_in_place(const at::Tensor& x, float factor) {
  if (!x.is_non_overlapping_and_dense())
    x.copy_(x.to(at::kFloat).mul_(factor));
  else if (x.scalar_type() == at::kHalf)
    scale_in_place(static_cast<c10::Half*>(x.data_ptr()), x.numel(), factor);
  else
    scale_in_place(static_cast<c10::BFloat16*>(x.data_ptr()), x.numel(), factor);
}

template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> loss_and_saved_gradient(const at::Tensor& student, const at::Tensor& teacher,
                                                                                   const Options& o, Variant variant, bool save_grad) {
  const auto options = student.options().memory_format(at::MemoryFormat::Contiguous);
  constexpr at::ScalarType compute = c10::CppTypeToScalarType<T>::value;
  const bool scaled = save_grad && student.scalar_type() == at::kHalf;
  const at::Tensor scale = at::empty({scaled ? student.size(0) : 0}, options.dtype(at::kFloat));
  const at::Tensor teacher_map = recycled_empty(save_grad ? map_shape(student) : std::vector<int64_t>{0}, compute);
  PooledFeatures<T> s(student, o), t(teacher, o);
  const double loss = transfer_loss(s, t, o, variant, 1, {save_grad, false}, scaled ? scale.mutable_data_ptr<float>() : nullptr,
                                    save_grad ? teacher_map.mutable_data_ptr<T>() : nullptr);
  return {at::empty({}, options.dtype(compute)).fill_(loss), save_grad ? s.finish_gradient() : at::empty({0}, options), scale, teacher_map};
}

template <typename T>
std::tuple<at::Tensor, at::Tensor> loss_gradients(const at::Tensor& student, const at::Tensor& teacher, const Options& o, Variant variant,
                                                  double upstream, std::array<bool, 2> wanted) {
  PooledFeatures<T> s(student, o), t(teacher, o);
  transfer_loss<T>(s, t, o, variant, upstream, wanted, nullptr, nullptr);
  const at::Tensor empty = at::empty({0}, student.options().memory_format(at::MemoryFormat::Contiguous));
  return {wanted[0] ? s.finish_gradient() : empty, wanted[1] ? t.finish_gradient() : empty};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_transfer_loss_cpu(const at::Tensor& student, const at::Tensor& teacher,
                                                                                       double p, int64_t variant, int64_t reduce,
                                                                                       double eps, bool save_grad) {
  check_pair(student, teacher);
  const auto kernel = compute_dtype(student, teacher) == at::kDouble ? loss_and_saved_gradient<double> : loss_and_saved_gradient<float>;
  const Options options = parse_options(p, reduce, eps);
  const Variant parsed_variant = parse_variant(variant);
  // The loss does not depend on the order of the positions, if it is the same for both networks.
  const std::vector<int64_t> order = order_without_copy(student);
  if (order.empty()) return kernel(student, teacher, options, parsed_variant, save_grad);
  auto [loss, grad, scale, teacher_map] = kernel(student.permute(order), teacher.permute(order), options, parsed_variant, save_grad);
  if (save_grad) {
    const std::vector<int64_t> inverse = inverse_order(order);
    std::vector<int64_t> inverse_of_map{0};
    for (size_t d = 2; d < inverse.size(); ++d) inverse_of_map.push_back(inverse[d] - 1);
    grad = grad.permute(inverse);
    teacher_map = teacher_map.permute(inverse_of_map).contiguous();
  }
  return {loss, grad, scale, teacher_map};
}

std::tuple<at::Tensor, at::Tensor> attention_transfer_loss_backward_cpu(const at::Tensor& grad_loss, const at::Tensor& student,
                                                                        const at::Tensor& teacher, double p, int64_t variant,
                                                                        int64_t reduce, double eps, std::array<bool, 2> wanted) {
  check_pair(student, teacher);
  check_floating(grad_loss, "grad_loss");
  check_shape(grad_loss, "grad_loss", {});
  const auto kernel = compute_dtype(student, teacher) == at::kDouble ? loss_gradients<double> : loss_gradients<float>;
  const Options options = parse_options(p, reduce, eps);
  const Variant parsed_variant = parse_variant(variant);
  const double upstream = grad_loss.item().toDouble();
  const std::vector<int64_t> order = order_without_copy(student);
  if (order.empty()) return kernel(student, teacher, options, parsed_variant, upstream, wanted);
  auto [grad_student, grad_teacher] = kernel(student.permute(order), teacher.permute(order), options, parsed_variant, upstream, wanted);
  const std::vector<int64_t> inverse = inverse_order(order);
  return {wanted[0] ? grad_student.permute(inverse) : grad_student, wanted[1] ? grad_teacher.permute(inverse) : grad_teacher};
}

// Multiplies a saved gradient by scale * grad_loss. The upstream gradient of a mean is one number
// and nearly always 1; unless the gradient is float16, nothing needs to be done then.
void attention_transfer_loss_rescale_cpu(at::Tensor& grad, const at::Tensor& scale, const at::Tensor& grad_loss) {
  check_floating(grad, "grad");
  check_floating(grad_loss, "grad_loss");
  check_shape(grad_loss, "grad_loss", {});
  TORCH_CHECK_VALUE(scale.dim() == 1 && scale.scalar_type() == at::kFloat, "scale must be float32 and [B] or [0], got ", scale.sizes());
  const double upstream = grad_loss.item().toDouble();
  if (scale.numel() == 0 && upstream == 1) return;
  if (grad.scalar_type() == at::kFloat || grad.scalar_type() == at::kDouble) {
    check_shape(scale, "scale", {0});
    grad.mul_(upstream);
    return;
  }
  TORCH_CHECK_VALUE(grad.dim() > 0, "grad must have a dimension of samples, got ", grad.sizes());
  if (scale.numel() > 0) check_shape(scale, "scale", {grad.size(0)});
  const at::Tensor scales = scale.numel() > 0 ? scale.to(at::kDouble) : at::ones({grad.size(0)}, scale.options().dtype(at::kDouble));
  const at::Tensor factors = scales.mul(upstream).to(at::kFloat).contiguous();
  parallel_for(0, grad.size(0), std::max<int64_t>(1, 4 * kGrain * grad.size(0) / std::max<int64_t>(1, grad.numel())),
               [&](int64_t begin, int64_t end) {
                 for (int64_t b = begin; b < end; ++b) scale_in_place(grad.select(0, b), factors.const_data_ptr<float>()[b]);
               });
}

}  // namespace
}  // namespace kdkernels::attention_pool

TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("attention_pool", kdkernels::attention_pool::attention_pool_cpu);
  m.impl("attention_pool_backward", kdkernels::attention_pool::attention_pool_backward_cpu);
  m.impl("attention_transfer_loss", kdkernels::attention_pool::attention_transfer_loss_cpu);
  m.impl("attention_transfer_loss_backward", kdkernels::attention_pool::attention_transfer_loss_backward_cpu);
  m.impl("attention_transfer_loss_rescale_", kdkernels::attention_pool::attention_transfer_loss_rescale_cpu);
}
