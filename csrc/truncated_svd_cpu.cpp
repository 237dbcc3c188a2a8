// CPU kernels of the truncated_svd ops. Compiled once per instruction set.
#include "truncated_svd.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include "memory.h"
#include "truncated_svd/derivative.h"
#include "truncated_svd/direct.h"
#include "truncated_svd/krylov.h"
#include "truncated_svd/tiers.h"
#include "truncated_svd/triplets.h"

namespace kdkernels::truncated_svd {
namespace {

using at::Tensor;

template <typename T>
constexpr at::ScalarType kType = c10::CppTypeToScalarType<T>::value;

// What the stages hand on for some groups: those that a thread works on, or all of them.
template <typename T>
struct Slots {
  Slots(int64_t groups, const Direct<T>& direct, int64_t k)
      : grams(groups * Direct<T>::kGroup * direct.gram_size()),
        vectors(groups * Direct<T>::kGroup * k * direct.vector_stride()),
        lambda(groups * Direct<T>::kGroup * k),
        scalings(groups * Direct<T>::kGroup),
        scales(groups * Direct<T>::kGroup, 1) {}
  Buffer<T> grams, vectors;
  std::vector<double> lambda;
  std::vector<Scaling> scalings;
  std::vector<double> scales;
};

// Runs sample stages and group stages in turn over a batch. A group stays with one thread and in its cache from stage to stage where there
// are groups enough; else every stage is shared out by itself. make() gives what a thread works with, slots(n) room for n groups.
template <typename MakeSlots, typename MakeLocal, typename Before, typename Group, typename After>
void over_groups(int64_t batch, int64_t group, MakeSlots&& slots, MakeLocal&& make, Before&& before, Group&& solve, After&& after) {
  const int64_t groups = (batch + group - 1) / group, threads = at::get_num_threads();
  if (groups >= 4 * threads || groups % threads == 0) {
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      auto room = slots(1);
      auto local = make();
      for (int64_t g = begin; g < end; ++g) {
        const int64_t last = std::min((g + 1) * group, batch);
        for (int64_t b = g * group; b < last; ++b) before(room, local, b, b - g * group);
        solve(room, local, g, 0, last - g * group);
        for (int64_t b = g * group; b < last; ++b) after(room, local, b, b - g * group);
      }
    });
    return;
  }
  auto room = slots(groups);
  auto each_sample = [&](auto&& stage) {
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      auto local = make();
      for (int64_t b = begin; b < end; ++b) stage(room, local, b, b);
    });
  };
  each_sample(before);
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    auto local = make();
    for (int64_t g = begin; g < end; ++g) solve(room, local, g, g, std::min(group, batch - g * group));
  });
  each_sample(after);
}

template <typename T>
struct Local {
  Local(const Matrices& m, int64_t k, int64_t state_size) : reader(m, gram_columns<T>(m)), work(m.p, k), state(state_size) {}
  Reader<T> reader;
  typename Eigen<T>::Workspace work;
  Buffer<Vec<T>> state;
};

struct Triplets {
  Tensor u, s, v, state;  // u [B, k, M] or empty, s [B, k], v [B, k, N]
};

Tensor some_matrices(const Matrices& m, const std::vector<int64_t>& which, at::ScalarType dtype) {
  std::vector<Tensor> each;
  for (int64_t b : which) each.push_back(m.one(b).to(dtype));
  return at::stack(each);
}

template <typename T>
class Decomposition {
 public:
  // lapack: whether matrices of double that squaring hurts go there.
  Decomposition(const Tensor& x, int64_t k, bool sign, bool return_u, bool save_state, bool lapack, Tier tier)
      : m_(x), k_(k), sign_(sign), lapack_(lapack), tier_(tier), direct_(m_, k), fate_(m_.batch, Fate::fine) {
    const auto options = x.options().dtype(kType<T>).memory_format(at::MemoryFormat::Contiguous);
    wants_b_ = return_u || !m_.tall;
    out_.v = at::empty({m_.batch, k, x.size(-1)}, options);
    out_.s = at::empty({m_.batch, k}, options);
    out_.u = at::empty({wants_b_ ? m_.batch : 0, k, x.size(-2)}, options);
    state_size_ = GroupState<T>::size(m_.p, k);
    out_.state = at::empty({save_state && tier == Tier::direct ? direct_.groups() * state_size_ * Direct<T>::kGroup : 0}, options);
    Tensor &a = m_.tall ? out_.v : out_.u, &b = m_.tall ? out_.u : out_.v;
    a_ = a.mutable_data_ptr<T>();
    b_ = wants_b_ ? b.mutable_data_ptr<T>() : nullptr;
  }

  Triplets run() {
    if (tier_ == Tier::krylov)
      krylov();
    else
      stages([&](Slots<T>& slots, Local<T>& local, int64_t b, int64_t slot) {
        finish(b, slots.vectors.get() + slot * k_ * direct_.vector_stride(), slots.lambda.data() + slot * k_, slots.scalings[slot],
               local.reader);
      });
    redo(Fate::open);
    redo(Fate::ill);
    return std::move(out_);
  }

  // What the derivative needs, alone.
  Tensor state() {
    stages([](Slots<T>&, Local<T>&, int64_t, int64_t) {});
    return out_.state;
  }

 private:
  enum class Fate : uint8_t { fine, open, ill };  // open: the Krylov tier gave it up

  void krylov() {
    constexpr int64_t group = Krylov<T>::kGroup;
    at::parallel_for(0, (m_.batch + group - 1) / group, 1, [&](int64_t begin, int64_t end) {
      Krylov<T> krylov(m_, k_);
      Reader<T> reader(m_, gram_columns<T>(m_));
      Buffer<T> vectors(group * k_ * krylov.stride());
      std::vector<double> lambda(group * k_);
      bool converged[group];
      for (int64_t first = begin * group; first < std::min(end * group, m_.batch); first += group) {
        const int64_t count = std::min(group, m_.batch - first);
        krylov.run(first, count, vectors.get(), lambda.data(), converged);
        for (int64_t i = 0; i < count; ++i) {
          if (converged[i])
            finish(first + i, vectors.get() + i * k_ * krylov.stride(), lambda.data() + i * k_, Scaling{}, reader);
          else
            fate_[first + i] = Fate::open;
        }
      }
    });
  }

  template <typename Finish>
  void stages(Finish&& finish) {
    const bool save = out_.state.numel() > 0;
    over_groups(
        m_.batch, Direct<T>::kGroup, [&](int64_t groups) { return Slots<T>(groups, direct_, k_); },
        [&] { return Local<T>(m_, k_, save ? 0 : state_size_); },
        [&](Slots<T>& slots, Local<T>& local, int64_t b, int64_t slot) {
          slots.scalings[slot] = direct_.gram_of(b, local.reader, slots.grams.get() + slot * direct_.gram_size());
          slots.scales[slot] = slots.scalings[slot].scale;
        },
        [&](Slots<T>& slots, Local<T>& local, int64_t g, int64_t group, int64_t count) {
          Vec<T>* memory =
              save ? reinterpret_cast<Vec<T>*>(out_.state.template mutable_data_ptr<T>()) + g * state_size_ : local.state.get();
          const int64_t first = group * Direct<T>::kGroup;
          T* grams = slots.grams.get() + first * direct_.gram_size();
          std::fill(grams + count * direct_.gram_size(), grams + Direct<T>::kGroup * direct_.gram_size(), T(0));
          direct_.eigen.top(grams, slots.scales.data() + first, GroupState<T>(memory, m_.p, k_),
                            slots.vectors.get() + first * k_ * direct_.vector_stride(), slots.lambda.data() + first * k_, local.work);
        },
        finish);
  }

  void finish(int64_t b, const T* a, const double* lambda, const Scaling& scaling, Reader<T>& reader) {
    T *small = a_ + b * k_ * m_.p, *large = wants_b_ ? b_ + b * k_ * m_.q : nullptr, *s = out_.s.template mutable_data_ptr<T>() + b * k_;
    if (!scaling.finite) {
      constexpr T nan = std::numeric_limits<T>::quiet_NaN();
      std::fill(small, small + k_ * m_.p, nan);
      if (large) std::fill(large, large + k_ * m_.q, nan);
      std::fill(s, s + k_, nan);
      return;
    }
    const bool ill = lambda[k_ - 1] < kIllConditioned<T> * kIllConditioned<T> * lambda[0];
    if (ill) fate_[b] = Fate::ill;
    for (int64_t j = 0; j < k_; ++j) {
      std::copy_n(a + j * direct_.vector_stride(), m_.p, small + j * m_.p);
      s[j] = static_cast<T>(std::sqrt(lambda[j]) / scaling.scale);
    }
    if (ill && (lapack_ || sizeof(T) == 4)) return;
    if (large) {
      project(b, a, scaling.scale, reader, large);
      std::vector<double> sigma(k_);
      normalize_triplets<T>(k_, large, m_.q, m_.q, sigma.data());
      for (int64_t j = 0; j < k_; ++j) s[j] = static_cast<T>(sigma[j] / scaling.scale);
      std::sort(s, s + k_, std::greater<T>());
    }
    if (sign_) signs(b);
  }

  void signs(int64_t b) {
    T *small = a_ + b * k_ * m_.p, *large = wants_b_ ? b_ + b * k_ * m_.q : nullptr;
    if (m_.tall)
      fix_signs<T>(k_, small, m_.p, large, m_.q);
    else
      fix_signs<T>(k_, large, m_.q, small, m_.p);
  }

  // out [k, q] = (scale M)^T a
  void project(int64_t b, const T* a, double scale, Reader<T>& reader, T* out) {
    const int64_t rows = k_ * direct_.vector_stride(), stride = padded<T>(reader.columns());
    Buffer<T> scaled(rows), line(k_ * stride);
    for (int64_t i = 0; i < rows; ++i) scaled.get()[i] = static_cast<T>(scale) * a[i];
    for (int64_t first = 0; first < m_.q; first += reader.columns()) {
      project_block<T>(m_, reader.read(b, first), k_, scaled.get(), direct_.vector_stride(), line.get(), stride);
      const int64_t count = std::min(reader.columns(), m_.q - first);
      for (int64_t j = 0; j < k_; ++j) std::copy_n(line.get() + j * stride, count, out + j * m_.q + first);
    }
  }

  // Matrices that the Krylov tier gave up go to the direct one. Squaring a matrix of float costs digits where the kept values span orders
  // of magnitude: those are done again in double, where squaring leaves more than float has. Double has nothing better than LAPACK's.
  void redo(Fate fate) {
    std::vector<int64_t> which;
    for (int64_t b = 0; b < m_.batch; ++b)
      if (fate_[b] == fate) which.push_back(b);
    if (which.empty() || (fate == Fate::ill && sizeof(T) == 8 && !lapack_)) return;
    const Tensor x = some_matrices(m_, which, fate == Fate::ill ? at::kDouble : m_.tensor().scalar_type());
    Triplets again;
    if (fate == Fate::open) {
      again = Decomposition<T>(x, k_, sign_, wants_b_, false, lapack_, Tier::direct).run();
    } else if (sizeof(T) == 4) {
      again = Decomposition<double>(x, k_, sign_, wants_b_, false, false, Tier::direct).run();
    } else {
      const auto [u, s, vh] = at::linalg_svd(x, false);
      again = {u.narrow(-1, 0, k_).transpose(-1, -2), s.narrow(-1, 0, k_), vh.narrow(-2, 0, k_), {}};
    }
    for (size_t i = 0; i < which.size(); ++i) {
      const int64_t row = static_cast<int64_t>(i);
      out_.s.select(0, which[i]).copy_(again.s.select(0, row));
      out_.v.select(0, which[i]).copy_(again.v.select(0, row));
      if (wants_b_) out_.u.select(0, which[i]).copy_(again.u.select(0, row));
      if (sign_) signs(which[i]);
    }
  }

  const Matrices m_;
  int64_t k_;
  bool sign_, lapack_, wants_b_;
  Tier tier_;
  Direct<T> direct_;
  std::vector<Fate> fate_;
  int64_t state_size_;
  Triplets out_;
  T *a_, *b_;
};

struct Cotangents {
  Tensor u, s, v;  // [B, k, M], [B, k], [B, k, N], contiguous in the compute type, or undefined
};

template <typename T>
class Backward {
 public:
  Backward(const Cotangents& grads, const Tensor& x, const Triplets& t, double gap_eps)
      : m_(x),
        gap_eps_(gap_eps),
        k_(t.s.size(-1)),
        direct_(m_, k_),
        a_(m_.tall ? t.v : t.u),
        s_(t.s),
        state_(t.state.numel() > 0 ? t.state : Decomposition<T>(x, k_, false, false, true, false, Tier::direct).state()),
        ga_(m_.tall ? grads.v : grads.u),
        gs_(grads.s),
        gb_(m_.tall ? grads.u : grads.v) {}

  // The gradient, in the layout of x and, rounded, in its type.
  Tensor run() {
    const Tensor gradient = recycled_empty_like(m_.tensor()), written = writable(gradient) ? gradient : rows_as_in_blocks();
    const Matrices to(written);
    const int64_t row = m_.along_p ? to.stride_q : to.stride_p, stride = direct_.vector_stride(), numbers = Derivative<T>::kept_size(k_);
    const bool aligned = row * sizeof(T) % simd::kBytes == 0 && reinterpret_cast<uintptr_t>(written.data_ptr()) % simd::kBytes == 0 &&
                         m_.row_length(m_.q) % kLanes<T> == 0;
    const bool stream = aligned && written.nbytes() > (size_t(32) << 20);
    over_groups(
        m_.batch, Direct<T>::kGroup, [&](int64_t groups) { return Room(groups * Direct<T>::kGroup, k_, stride); },
        [&] { return Own(m_, k_, stride); },
        [&](Room& room, Own& own, int64_t b, int64_t slot) {
          own.derivative.before(inputs(b, own.a.get()), own.reader, b, state_of(b).scale[0][lane(b)],
                                room.vectors.get() + slot * k_ * stride, room.kept.data() + slot * numbers);
        },
        [&](Room& room, Own& own, int64_t g, int64_t group, int64_t count) {
          T* r = room.vectors.get() + group * Direct<T>::kGroup * k_ * stride;
          std::fill(r + count * k_ * stride, r + Direct<T>::kGroup * k_ * stride, T(0));
          direct_.eigen.solve(state_of(g * Direct<T>::kGroup), gap_eps_, r, own.work);
        },
        [&](Room& room, Own& own, int64_t b, int64_t slot) {
          const GroupState<T> state = state_of(b);
          for (int64_t j = 0; j < k_; ++j)
            own.lambda[j] = static_cast<double>(state.lambda_high[j][lane(b)]) + static_cast<double>(state.lambda_low[j][lane(b)]);
          with_storage<T>(written.scalar_type(), [&](auto* type) {
            using Storage = std::remove_pointer_t<decltype(type)>;
            own.derivative.after(inputs(b, own.a.get()), own.lambda.data(), gap_eps_, own.reader, b, state.scale[0][lane(b)],
                                 room.kept.data() + slot * numbers, room.vectors.get() + slot * k_ * stride,
                                 written.mutable_data_ptr<Storage>() + to.offset(b), row, stream);
          });
          if (stream) simd::fence();
        });
    if (!written.is_same(gradient)) gradient.copy_(written);
    return gradient;
  }

 private:
  struct Room {
    Room(int64_t samples, int64_t k, int64_t stride) : vectors(samples * k * stride), kept(samples * Derivative<T>::kept_size(k)) {}
    Buffer<T> vectors;
    std::vector<double> kept;
  };
  struct Own {
    Own(const Matrices& m, int64_t k, int64_t stride)
        : reader(m, gram_columns<T>(m)), work(m.p, k), derivative(m, k, stride, reader.columns()), a(k * stride), lambda(k) {}
    Reader<T> reader;
    typename Eigen<T>::Workspace work;
    Derivative<T> derivative;
    Buffer<T> a;
    std::vector<double> lambda;
  };

  static int lane(int64_t b) { return static_cast<int>(b % Direct<T>::kGroup); }
  GroupState<T> state_of(int64_t b) const {
    auto* memory = reinterpret_cast<Vec<T>*>(const_cast<T*>(state_.template const_data_ptr<T>()));  // it is only read
    return {memory + b / Direct<T>::kGroup * GroupState<T>::size(m_.p, k_), m_.p, k_};
  }

  // Whether rows lie in the gradient as they do in blocks of M.
  bool writable(const Tensor& gradient) const {
    const Matrices g(gradient);
    return (m_.along_p ? g.stride_p : g.stride_q) == 1;
  }
  Tensor rows_as_in_blocks() const {
    auto sizes = m_.tensor().sizes().vec();
    sizes.resize(sizes.size() - 2);
    sizes.insert(sizes.end(), {m_.along_p ? m_.q : m_.p, m_.along_p ? m_.p : m_.q});
    const Tensor result = at::empty(sizes, m_.tensor().options().memory_format(at::MemoryFormat::Contiguous));
    return m_.along_p == m_.tall ? result : result.transpose(-1, -2);
  }

  typename Derivative<T>::Inputs inputs(int64_t b, T* padded_a) const {
    const int64_t stride = direct_.vector_stride();
    const T* a = a_.template const_data_ptr<T>() + b * k_ * m_.p;
    for (int64_t j = 0; j < k_; ++j) {
      std::copy_n(a + j * m_.p, m_.p, padded_a + j * stride);
      std::fill(padded_a + j * stride + m_.p, padded_a + (j + 1) * stride, T(0));
    }
    auto of = [&](const Tensor& t, int64_t size) { return t.defined() ? t.template const_data_ptr<T>() + b * size : nullptr; };
    return {padded_a, s_.template const_data_ptr<T>() + b * k_, of(ga_, k_ * m_.p), of(gs_, k_), of(gb_, k_ * m_.q)};
  }

  const Matrices m_;
  double gap_eps_;
  int64_t k_;
  Direct<T> direct_;
  Tensor a_, s_, state_, ga_, gs_, gb_;
};

// The rows of a batch that are named.
Tensor rows(const Tensor& t, const std::vector<int64_t>& which, at::ScalarType dtype) {
  if (!t.defined()) return t;
  std::vector<Tensor> each;
  for (int64_t b : which) each.push_back(t.select(0, b));
  return at::stack(each).to(dtype);
}

// Matrices whose forward was done again in double have their derivative from there too.
void redo_ill_gradients(const Cotangents& grads, const Matrices& m, const Triplets& t, double gap_eps, const Tensor& gradient) {
  const int64_t k = t.s.size(-1);
  const float* s = t.s.const_data_ptr<float>();
  std::vector<int64_t> which;
  for (int64_t b = 0; b < m.batch; ++b)
    if (s[b * k + k - 1] < kIllConditioned<float> * s[b * k]) which.push_back(b);
  if (which.empty()) return;
  const Tensor x = some_matrices(m, which, at::kDouble);
  const Triplets exact = Decomposition<double>(x, k, false, !m.tall || t.u.defined(), true, false, Tier::direct).run();
  // The signs that were given out.
  auto aligned = [&](const Tensor& mine, const Tensor& given) {
    const Tensor theirs = rows(given, which, at::kDouble);
    return mine.mul(theirs).sum(-1, true).sign();
  };
  const Tensor flip = aligned(exact.v, t.v);
  const Triplets signs{exact.u.numel() ? exact.u.mul(flip) : exact.u, exact.s, exact.v.mul(flip), exact.state};
  const Cotangents wide{rows(grads.u, which, at::kDouble), rows(grads.s, which, at::kDouble), rows(grads.v, which, at::kDouble)};
  const Tensor result = Backward<double>(wide, x, signs, gap_eps).run();
  const Matrices to(gradient);
  for (size_t i = 0; i < which.size(); ++i) to.one(which[i]).copy_(result.select(0, static_cast<int64_t>(i)));
}

// [..., n, k] as [B, k, n]
Tensor vectors_first(const Tensor& t, at::ScalarType dtype) {
  const Tensor rows = t.transpose(-1, -2);
  return rows.to(dtype).contiguous().view({-1, rows.size(-2), rows.size(-1)});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> truncated_svd_cpu(const Tensor& x, int64_t k, c10::string_view sign, bool return_u, double,
                                                             bool save_state) {
  check_matrices(x, k);
  const bool fix = parse_sign(sign), is_double = compute_dtype(x) == at::kDouble;
  Triplets t = is_double ? Decomposition<double>(x, k, fix, return_u, save_state, true, Tier::direct).run()
                         : Decomposition<float>(x, k, fix, return_u, save_state, true, tier_for<float>(Matrices(x), k)).run();
  auto sizes = x.sizes().vec();
  sizes.resize(sizes.size() - 2);
  auto shaped = [&](const Tensor& rows, bool vectors) {
    auto all = sizes;
    all.push_back(k);
    if (vectors) all.push_back(rows.size(-1));
    const Tensor result = rows.view(all);
    return vectors ? result.transpose(-1, -2) : result;
  };
  return {t.u.numel() > 0 || t.u.size(0) == t.s.size(0) ? shaped(t.u, true) : at::empty({0}, t.u.options()), shaped(t.s, false),
          shaped(t.v, true), t.state};
}

Tensor truncated_svd_backward_cpu(const std::optional<Tensor>& grad_u, const std::optional<Tensor>& grad_s,
                                  const std::optional<Tensor>& grad_v, const Tensor& x, const Tensor& u, const Tensor& s, const Tensor& v,
                                  const Tensor& state, double gap_eps) {
  const int64_t k = s.size(-1);
  check_matrices(x, k);
  const at::ScalarType dtype = compute_dtype(x);
  auto batch = x.sizes().vec();
  batch.resize(batch.size() - 2);
  auto shape = [&](std::initializer_list<int64_t> last) {
    auto all = batch;
    all.insert(all.end(), last);
    return all;
  };
  const int64_t rows = x.size(-2), columns = x.size(-1);
  const bool has_u = u.dim() == x.dim();
  check_shape(s, "s", shape({k}));
  check_shape(v, "v", shape({columns, k}));
  if (has_u) check_shape(u, "u", shape({rows, k}));
  TORCH_CHECK_VALUE(has_u || rows >= columns, "u is needed where M < N");
  TORCH_CHECK_VALUE(gap_eps >= 0, "gap_eps must be >= 0, got ", gap_eps);
  auto given = [&](const std::optional<Tensor>& g, const char* name, at::IntArrayRef sizes) {
    if (!g || !g->defined()) return Tensor();
    check_shape(*g, name, sizes);
    return *g;
  };
  const Tensor gu = given(grad_u, "grad_u", has_u ? at::IntArrayRef(shape({rows, k})) : at::IntArrayRef{0});
  const Tensor gs = given(grad_s, "grad_s", shape({k})), gv = given(grad_v, "grad_v", shape({columns, k}));
  Cotangents grads{gu.defined() && has_u ? vectors_first(gu, dtype) : Tensor(),
                   gs.defined() ? gs.to(dtype).contiguous().view({-1, k}) : Tensor(), gv.defined() ? vectors_first(gv, dtype) : Tensor()};
  const Triplets t{has_u ? vectors_first(u, dtype) : Tensor(), s.to(dtype).contiguous().view({-1, k}), vectors_first(v, dtype), state};
  if (dtype == at::kDouble) return Backward<double>(grads, x, t, gap_eps).run();
  const Tensor gradient = Backward<float>(grads, x, t, gap_eps).run();
  redo_ill_gradients(grads, Matrices(x), t, gap_eps, gradient);
  return gradient;
}

}  // namespace
}  // namespace kdkernels::truncated_svd

TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("truncated_svd", kdkernels::truncated_svd::truncated_svd_cpu);
  m.impl("truncated_svd_backward", kdkernels::truncated_svd::truncated_svd_backward_cpu);
}
