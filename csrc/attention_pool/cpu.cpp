// CPU kernels of the attention_pool and attention_transfer_loss ops. Compiled once per instruction set.
#include "attention_pool.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include "../common/memory.h"
#include "maps.h"
#include "scatter.h"

namespace kdkernels::attention_pool {
namespace {

constexpr int64_t kGrain = 1 << 14;  // numbers below which a second thread costs more than it brings

// Calls body with a null pointer of the type that features are stored in.
template <typename T, typename Body>
void with_storage(at::ScalarType stored, Body&& body) {
  if constexpr (std::is_same_v<T, float>) {
    if (stored == at::kBFloat16) return body(static_cast<c10::BFloat16*>(nullptr));
    if (stored == at::kHalf) return body(static_cast<c10::Half*>(nullptr));
  }
  body(static_cast<T*>(nullptr));
}

// The features of one net, and how a map is made of them.
template <typename T>
class Net {
 public:
  Net(const at::Tensor& x, const Options& options)
      : original_(x), f(view(x.scalar_type() != at::kDouble && std::is_same_v<T, double> ? x.to(at::kDouble) : x)), options_(options) {}

  bool maximum() const { return options_.reduce == Reduce::max; }
  int64_t batch() const { return f.batch; }
  int64_t places() const { return f.places; }
  int64_t numbers() const { return f.channels * f.places; }  // of a sample
  // dMap/dx is |x|^(p-1) sign(x) times this.
  double factor() const { return options_.p / (options_.reduce == Reduce::mean ? static_cast<double>(f.channels) : 1); }

  // A bound of |dL/dx| of a sample, from its map q * divisor and the weights of its places: |x|^(p-1) is largest where one channel makes
  // the whole map, or, for p < 1, where x is the smallest number of half precision.
  double gradient_bound(const T* q, double divisor, const T* weight) const {
    const double p = options_.p, count = options_.reduce == Reduce::mean ? static_cast<double>(f.channels) : 1;
    const double steepest = p < 1 ? std::pow(0x1p-24, p - 1) : 0;
    double bound = 0;
    for (int64_t i = 0; i < f.places; ++i) {
      const double slope = p < 1 ? steepest : p == 2 ? std::sqrt(q[i] * divisor * count) : std::pow(q[i] * divisor * count, 1 - 1 / p);
      const double size = std::abs(static_cast<double>(weight[i])) * slope;
      if (!(size <= bound)) bound = size;
    }
    return bound;
  }

  // The map of sample b at places [first, first + count).
  void pool_part(int64_t b, int64_t first, int64_t count, T* map, int32_t* channel) const {
    with_storage<T>(f.x.scalar_type(), [&](auto* type) {
      using Storage = std::remove_pointer_t<decltype(type)>;
      with_power<T>(options_.p, [&](const auto& power) {
        pool(part(count), at<const Storage>(f, b, first), maximum(), options_.reduce == Reduce::mean, power, map, channel);
      });
    });
  }

  // A tensor for the gradient, in the layout of the features.
  void make_gradient() {
    gradient_ = recycled_empty_like(original_);
    auto same = gradient_.scalar_type() == f.x.scalar_type() ? view_as(gradient_, f.channels_adjacent) : std::nullopt;
    if (!same) {
      const auto options = f.x.options().memory_format(at::MemoryFormat::Contiguous);
      same = view_as(f.channels_adjacent ? at::empty({f.batch, f.places, f.channels}, options).transpose(1, 2).view(f.x.sizes())
                                         : at::empty(f.x.sizes(), options),
                     f.channels_adjacent);
    }
    g = *same;
    written_ = g.x;
    const int64_t row = f.channels_adjacent ? f.channels : f.places;
    const bool aligned = row * f.x.element_size() % simd::kBytes == 0 && reinterpret_cast<uintptr_t>(address(g.x)) % simd::kBytes == 0;
    streamed_ = aligned && original_.nbytes() > (size_t(32) << 20);
  }

  void scatter_part(int64_t b, int64_t first, int64_t count, const T* weight, const int32_t* channel) const {
    with_storage<T>(f.x.scalar_type(), [&](auto* type) {
      using Storage = std::remove_pointer_t<decltype(type)>;
      with_power<T>(options_.p, [&](const auto& power) {
        Features to = g;
        to.places = count;
        const bool stream = streamed_ && (f.channels_adjacent || count == f.places);
        scatter(part(count), at<const Storage>(f, b, first), to, maximum(), stream, power, weight, channel, at<Storage>(g, b, first));
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
    Features some = f;
    some.places = count;
    return some;
  }
  template <typename Storage>
  static Storage* at(const Features& f, int64_t b, int64_t first) {
    return f.template sample<std::remove_const_t<Storage>>(b) + first * (f.channels_adjacent ? f.stride : 1);
  }

  at::Tensor original_, gradient_, written_;
  Features f, g;
  Options options_;
  bool streamed_ = false;
};

// The exponent that lifts numbers of at most `bound` to the top of half precision's range, with a bit to spare for their rounding.
inline int half_exponent(double bound) {
  int exponent = 15;
  if (bound > 0 && std::isfinite(bound)) std::frexp(bound, &exponent);
  return std::clamp(15 - exponent, -100, 100);
}

// Numbers of every sample that the stages hand on: for all samples, or for the one that a thread works on.
template <typename T>
struct Scratch {
  Scratch(int64_t samples, int64_t places, int arrays, int channels)
      : values(new T[samples * places * arrays + simd::kLanes<T>]), indices(new int32_t[samples * places * channels + 1]), stride(places) {}
  T* array(int i, int64_t sample, int64_t samples) const { return values.get() + (i * samples + sample) * stride; }
  int32_t* channel(int i, int64_t sample, int64_t samples) const { return indices.get() + (i * samples + sample) * stride; }
  std::unique_ptr<T[]> values;
  std::unique_ptr<int32_t[]> indices;
  int64_t stride;
};

// Runs pool(b, first, count, slot), finish(b, slot) and scatter(b, first, count, slot) for all samples. A sample stays with one thread, so
// that its features are still in a cache when the gradient reads them again; only where there are fewer samples than threads are its
// places shared out, stage by stage. slot is the sample's number in `scratch`, of slots().
class Schedule {
 public:
  Schedule(int64_t batch, int64_t places, int64_t numbers) : batch_(batch), places_(places), numbers_(numbers) {
    const int64_t threads = at::get_num_threads();
    shared_ = batch < threads && numbers >= 4 * kGrain && places >= 128;
    parts_ = shared_ ? std::min<int64_t>((threads + batch - 1) / batch, places / 64) : 1;
  }
  int64_t slots() const { return shared_ ? batch_ : 1; }

  template <typename MakeScratch, typename Pool, typename Finish, typename Scatter>
  void run(MakeScratch&& make_scratch, Pool&& pool, Finish&& finish, Scatter&& scatter) const {
    if (!shared_) {
      at::parallel_for(0, batch_, std::max<int64_t>(1, kGrain / numbers_), [&](int64_t begin, int64_t end) {
        const auto scratch = make_scratch();
        for (int64_t b = begin; b < end; ++b) {
          pool(scratch, b, 0, places_, 0);
          finish(scratch, b, 0);
          scatter(scratch, b, 0, places_, 0);
        }
        simd::fence();
      });
      return;
    }
    const auto scratch = make_scratch();
    auto over_parts = [&](auto&& stage) {
      at::parallel_for(0, batch_ * parts_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / parts_, k = i % parts_, first = boundary(k), count = boundary(k + 1) - first;
          stage(scratch, b, first, count, b);
        }
        simd::fence();
      });
    };
    over_parts(pool);
    at::parallel_for(0, batch_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) finish(scratch, b, b);
    });
    over_parts(scatter);
  }

 private:
  int64_t boundary(int64_t k) const { return k == parts_ ? places_ : places_ * k / parts_ / 16 * 16; }
  int64_t batch_, places_, numbers_, parts_;
  bool shared_;
};

template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> pool_forward(const at::Tensor& x, const Options& o, Normalize normalize) {
  const Net<T> net(x, o);
  const at::Tensor maps =
      at::empty(map_shape(x), x.options().dtype(c10::CppTypeToScalarType<T>::value).memory_format(at::MemoryFormat::Contiguous));
  const at::Tensor norm = at::empty({normalize == Normalize::l2 ? net.batch() : 0}, x.options().dtype(at::kDouble));
  const at::Tensor channel =
      net.maximum() ? at::empty(map_shape(x), x.options().dtype(at::kInt)) : at::empty({0}, x.options().dtype(at::kInt));
  T* map = maps.mutable_data_ptr<T>();
  int32_t* from = net.maximum() ? channel.mutable_data_ptr<int32_t>() : nullptr;
  const int64_t places = net.places();
  Schedule(net.batch(), places, net.numbers())
      .run([] { return 0; },
           [&](int, int64_t b, int64_t first, int64_t count, int64_t) {
             net.pool_part(b, first, count, map + b * places + first, from ? from + b * places + first : nullptr);
           },
           [&](int, int64_t b, int64_t) {
             T* a = map + b * places;
             if (normalize == Normalize::l2) {
               const L2<T> l2(a, places, o.eps);
               norm.mutable_data_ptr<double>()[b] = l2.norm;
               l2.normalize(a, places, a);
             } else if (normalize == Normalize::softmax) {
               softmax(a, places, a);
             }
           },
           [](int, int64_t, int64_t, int64_t, int64_t) {});
  return {maps, norm, channel};
}

template <typename T>
at::Tensor pool_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& maps, const at::Tensor& norm,
                         const at::Tensor& channel, const Options& o, Normalize normalize) {
  Net<T> net(x, o);
  net.make_gradient();
  const at::Tensor upstream = grad.to(c10::CppTypeToScalarType<T>::value).contiguous(), q = maps.contiguous();
  const T *g = upstream.const_data_ptr<T>(), *map = q.const_data_ptr<T>();
  const int32_t* from = net.maximum() ? channel.const_data_ptr<int32_t>() : nullptr;
  const int64_t places = net.places();
  const Schedule schedule(net.batch(), places, net.numbers());
  const double factor = net.factor();
  schedule.run([&] { return Scratch<T>(schedule.slots(), places, 1, 0); }, [](const Scratch<T>&, int64_t, int64_t, int64_t, int64_t) {},
               [&](const Scratch<T>& scratch, int64_t b, int64_t slot) {
                 T* weight = scratch.array(0, slot, schedule.slots());
                 const T *own = map + b * places, *up = g + b * places;
                 if (normalize == Normalize::l2)
                   L2<T>(norm.const_data_ptr<double>()[b], o.eps).backward(own, up, places, factor, weight);
                 else if (normalize == Normalize::softmax)
                   softmax_backward(own, up, places, factor, weight);
                 else
                   for (int64_t s = 0; s < places; ++s) weight[s] = up[s] * static_cast<T>(factor);
               },
               [&](const Scratch<T>& scratch, int64_t b, int64_t first, int64_t count, int64_t slot) {
                 net.scatter_part(b, first, count, scratch.array(0, slot, schedule.slots()) + first,
                                  from ? from + b * places + first : nullptr);
               });
  return net.finish_gradient();
}

// The loss times `upstream`, and the gradients that are wanted.
//
// scale [B] and teacher_map [B, places] are written if they are not null. A student in float16 has a scale: its gradient is written divided
// by it.
template <typename T>
double transfer(Net<T>& student, Net<T>& teacher, const Options& o, Variant variant, double upstream, std::array<bool, 2> wanted,
                float* sample_scale, T* teacher_map) {
  const int64_t batch = student.batch(), places = student.places();
  Net<T>* const nets[2] = {&student, &teacher};
  for (int i = 0; i < 2; ++i)
    if (wanted[i]) nets[i]->make_gradient();
  const Schedule schedule(batch, places, student.numbers() + teacher.numbers());
  const int64_t slots = schedule.slots();
  std::vector<double> losses(batch);
  enum { kDifference = 2, kWeight, kArrays = kWeight + 2 };  // arrays 0 and 1 are the maps
  schedule.run([&] { return Scratch<T>(slots, places, kArrays, student.maximum() ? 2 : 0); },
               [&](const Scratch<T>& scratch, int64_t b, int64_t first, int64_t count, int64_t slot) {
                 for (int i = 1; i >= 0; --i)  // the student last: it is read again
                   nets[i]->pool_part(b, first, count, scratch.array(i, slot, slots) + first,
                                      student.maximum() ? scratch.channel(i, slot, slots) + first : nullptr);
               },
               [&](const Scratch<T>& scratch, int64_t b, int64_t slot) {
                 T *qs = scratch.array(0, slot, slots), *qt = scratch.array(1, slot, slots), *d = scratch.array(kDifference, slot, slots);
                 const L2<T> s(qs, places, o.eps), t(qt, places, o.eps);
                 if (teacher_map) std::copy_n(qt, places, teacher_map + b * places);
                 s.normalize(qs, places, qs);
                 t.normalize(qt, places, qt);
                 for (int64_t i = 0; i < places; ++i) d[i] = qs[i] - qt[i];
                 const double norm = L2<T>::norm_of(d, places);
                 losses[b] = variant == Variant::authors ? norm * norm / static_cast<double>(places) : norm;
                 const double slope = variant == Variant::authors ? 2 / static_cast<double>(places) : norm > 0 ? 1 / norm : norm;
                 const double scale = upstream * slope / static_cast<double>(batch);
                 T* const weight = scratch.array(kWeight, slot, slots);
                 if (wanted[0]) s.backward(qs, d, places, scale * student.factor(), weight);
                 if (sample_scale) {
                   const int exponent = half_exponent(student.gradient_bound(qs, s.divisor(), weight));
                   sample_scale[b] = std::ldexp(1.0f, -exponent);
                   for (int64_t i = 0; i < places; ++i) weight[i] = std::ldexp(weight[i], exponent);
                 }
                 if (wanted[1]) t.backward(qt, d, places, -scale * teacher.factor(), scratch.array(kWeight + 1, slot, slots));
               },
               [&](const Scratch<T>& scratch, int64_t b, int64_t first, int64_t count, int64_t slot) {
                 for (int i = 0; i < 2; ++i)
                   if (wanted[i])
                     nets[i]->scatter_part(b, first, count, scratch.array(kWeight + i, slot, slots) + first,
                                           student.maximum() ? scratch.channel(i, slot, slots) + first : nullptr);
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
    const int32_t* from = channel.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < channel.numel(); ++i)
      TORCH_CHECK_VALUE(from[i] >= 0 && from[i] < x.size(1), "channel must lie in [0, ", x.size(1), "), got ", from[i]);
  }
  const auto kernel = compute_dtype(x) == at::kDouble ? pool_backward<double> : pool_backward<float>;
  return kernel(grad, x, maps, norm, channel, o, normalized);
}

// p[i] *= factor in float, rounded once.
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
  const at::Tensor teacher_map = at::empty(save_grad ? map_shape(student) : std::vector<int64_t>{0}, options.dtype(compute));
  Net<T> s(student, o), t(teacher, o);
  const double loss = transfer(s, t, o, variant, 1, {save_grad, false}, scaled ? scale.mutable_data_ptr<float>() : nullptr,
                               save_grad ? teacher_map.mutable_data_ptr<T>() : nullptr);
  return {at::empty({}, options.dtype(compute)).fill_(loss), save_grad ? s.finish_gradient() : at::empty({0}, options), scale, teacher_map};
}

template <typename T>
std::tuple<at::Tensor, at::Tensor> loss_gradients(const at::Tensor& student, const at::Tensor& teacher, const Options& o, Variant variant,
                                                  double upstream, std::array<bool, 2> wanted) {
  Net<T> s(student, o), t(teacher, o);
  transfer<T>(s, t, o, variant, upstream, wanted, nullptr, nullptr);
  const at::Tensor none = at::empty({0}, student.options().memory_format(at::MemoryFormat::Contiguous));
  return {wanted[0] ? s.finish_gradient() : none, wanted[1] ? t.finish_gradient() : none};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_transfer_loss_cpu(const at::Tensor& student, const at::Tensor& teacher,
                                                                                       double p, int64_t variant, int64_t reduce,
                                                                                       double eps, bool save_grad) {
  check_pair(student, teacher);
  const auto kernel = compute_dtype(student, teacher) == at::kDouble ? loss_and_saved_gradient<double> : loss_and_saved_gradient<float>;
  return kernel(student, teacher, parse_options(p, reduce, eps), parse_variant(variant), save_grad);
}

std::tuple<at::Tensor, at::Tensor> attention_transfer_loss_backward_cpu(const at::Tensor& grad_loss, const at::Tensor& student,
                                                                        const at::Tensor& teacher, double p, int64_t variant,
                                                                        int64_t reduce, double eps, std::array<bool, 2> wanted) {
  check_pair(student, teacher);
  check_floating(grad_loss, "grad_loss");
  check_shape(grad_loss, "grad_loss", {});
  const auto kernel = compute_dtype(student, teacher) == at::kDouble ? loss_gradients<double> : loss_gradients<float>;
  return kernel(student, teacher, parse_options(p, reduce, eps), parse_variant(variant), grad_loss.item().toDouble(), wanted);
}

// The gradient of a mean arrives as one number, nearly always 1: then nothing is to be done, unless the gradient is in float16.
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
  at::parallel_for(0, grad.size(0), std::max<int64_t>(1, 4 * kGrain * grad.size(0) / std::max<int64_t>(1, grad.numel())),
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
