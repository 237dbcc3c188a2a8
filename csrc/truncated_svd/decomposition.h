// The forward: which matrices go through which stages on which thread, and what is done again where squaring or convergence failed.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>

#include "direct.h"
#include "krylov.h"
#include "triplets.h"
#include "truncated_svd.h"

namespace kdkernels::truncated_svd {

using at::Tensor;

template <typename T>
constexpr at::ScalarType kType = c10::CppTypeToScalarType<T>::value;

// Which tier decomposes which shape.
enum class Tier { direct, krylov };

// Microseconds of a matrix on one thread, direct / Krylov: maps of a random network with ReLU, AVX-512 on Zen 4 (kdkernels::_svd_tier).
//
//     q x p        k = 1         k = 2         k = 4         k = 8
//   196 x  96     50 /  21      53 /  59      54 / 126      65 /  254
//   256 x 112     64 /  19      69 /  60      83 / 135      82 /  288
//   196 x 160    137 /  35     141 /  77     190 / 160     201 /  388
//   196 x 196    231 /  47     230 /  95     248 / 182     258 /  469
//   256 x 256    494 /  63     491 / 119     499 / 231     556 /  721
//   784 x 320   1590 / 222    1610 / 460    1672 / 609    1689 / 1568
//   784 x 512   5508 / 413    5336 / 860    5151 /1003    5459 / 3225
//
// Spectra with smaller gaps take the Krylov tier longer, at worst to be given up after most of the time of a direct decomposition, so it
// has to be ahead by more than a little. In double, a residual of rounding takes it too many steps.
template <typename T>
Tier tier_for(const Matrices& m, int64_t k) {
  if (sizeof(T) == 8 || k > 8) return Tier::direct;
  const int64_t from = k == 1 ? 80 : k == 2 ? 112 : k <= 4 ? 160 : 300;
  return m.p >= from ? Tier::krylov : Tier::direct;
}

// What the stages hand on for some groups: those that a thread works on, or all of them.
template <typename T>
struct Slots {
  Slots(int64_t groups, const Direct<T>& direct, int64_t k)
      : grams(groups * Direct<T>::kGroup * direct.gram_size()),
        vectors(groups * Direct<T>::kGroup * k * direct.vector_stride()),
        lambda(groups * Direct<T>::kGroup * k),
        scales(groups * Direct<T>::kGroup, 1),
        range(groups * Direct<T>::kGroup) {}
  Buffer<T> grams, vectors;
  std::vector<double> lambda;
  std::vector<double> scales;
  std::vector<Range> range;
};

// Runs sample stages and group stages in turn over a batch. A group stays with one thread and in its cache from stage to stage where there
// are groups enough, or where `bytes` of room for each would be too many; else every stage is shared out by itself. make() gives what a
// thread works with, slots(n) room for n groups.
template <typename MakeSlots, typename MakeLocal, typename Before, typename Group, typename After>
void over_groups(int64_t batch, int64_t group, int64_t bytes, MakeSlots&& slots, MakeLocal&& make, Before&& before, Group&& solve,
                 After&& after) {
  const int64_t groups = (batch + group - 1) / group, threads = at::get_num_threads();
  if (groups >= 4 * threads || groups % threads == 0 || groups * bytes > (int64_t(1) << 28)) {
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

inline Tensor index_of(const std::vector<int64_t>& which) {
  const Tensor index = at::empty({static_cast<int64_t>(which.size())}, at::kLong);
  std::copy(which.begin(), which.end(), index.mutable_data_ptr<int64_t>());
  return index;
}

// The matrices of a batch that are named, [n, M, N].
inline Tensor some_matrices(const Matrices& m, const std::vector<int64_t>& which, at::ScalarType dtype) {
  if (m.tensor().dim() == 3) return m.tensor().index_select(0, index_of(which)).to(dtype);
  std::vector<Tensor> each;
  for (int64_t b : which) each.push_back(m.one(b).to(dtype));
  return at::stack(each);
}

// x [n, M, N] of double, finite, each matrix times the power of two that brings its largest number near 1. The power comes as two factors
// [n, 1, 1], for it may be out of range itself.
struct InUnits {
  explicit InUnits(const Tensor& given) : first(at::empty({given.size(0), 1, 1}, given.options())), second(at::empty_like(first)) {
    const Tensor largest = given.abs().amax({-2, -1}).contiguous();
    for (int64_t b = 0; b < given.size(0); ++b) {
      const int exponent = -std::ilogb(largest.const_data_ptr<double>()[b]);
      first.mutable_data_ptr<double>()[b] = std::ldexp(1.0, exponent / 2);
      second.mutable_data_ptr<double>()[b] = std::ldexp(1.0, exponent - exponent / 2);
    }
    x = given.mul(first).mul(second);
  }
  Tensor first, second, x;
};

// The triplets of matrices [n, M, N] of double whose kept values span orders of magnitude, see rounds.h. u is empty unless wants_b.
Triplets by_rounds(const Tensor& x, int64_t k, bool wants_b);

template <typename T>
class Decomposition {
 public:
  // rounds: whether matrices of double that squaring hurts are decomposed by rounds.
  Decomposition(const Tensor& x, int64_t k, bool sign, bool return_u, bool save_state, bool rounds, Tier tier)
      : m_(x), k_(k), sign_(sign), rounds_(rounds), tier_(tier), direct_(m_, k), fate_(m_.batch, Fate::fine) {
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
        finish(b, slots.vectors.get() + slot * k_ * direct_.vector_stride(), slots.lambda.data() + slot * k_,
               {slots.scales[slot], slots.range[slot]}, local.reader);
      });
    redo(Fate::open);
    redo(Fate::out);
    redo(Fate::ill);
    return std::move(out_);
  }

  // What the derivative needs, alone.
  Tensor state() {
    stages([](Slots<T>&, Local<T>&, int64_t, int64_t) {});
    return out_.state;
  }

 private:
  enum class Fate : uint8_t { fine, open, out, ill };  // open: the Krylov tier gave it up; out: see Range

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
        m_.batch, Direct<T>::kGroup, Direct<T>::kGroup * direct_.gram_size() * static_cast<int64_t>(sizeof(T)),
        [&](int64_t groups) { return Slots<T>(groups, direct_, k_); }, [&] { return Local<T>(m_, k_, save ? 0 : state_size_); },
        [&](Slots<T>& slots, Local<T>& local, int64_t b, int64_t slot) {
          const Scaling scaling = direct_.gram_of(b, local.reader, slots.grams.get() + slot * direct_.gram_size());
          slots.scales[slot] = scaling.scale;
          slots.range[slot] = scaling.range;
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
    if (scaling.range == Range::out) {
      fate_[b] = Fate::out;
      return;
    }
    if (scaling.range == Range::broken) {
      constexpr T nan = std::numeric_limits<T>::quiet_NaN();
      std::fill(small, small + k_ * m_.p, nan);
      if (large) std::fill(large, large + k_ * m_.q, nan);
      std::fill(s, s + k_, nan);
      return;
    }
    const bool ill = lambda[k_ - 1] < kIllConditioned * kIllConditioned * lambda[0];
    if (ill) fate_[b] = Fate::ill;
    for (int64_t j = 0; j < k_; ++j) {
      std::copy_n(a + j * direct_.vector_stride(), m_.p, small + j * m_.p);
      s[j] = static_cast<T>(std::sqrt(lambda[j]) / scaling.scale);
    }
    if (ill && (rounds_ || sizeof(T) == 4)) return;
    if (large) {
      project(b, a, scaling.scale, reader, large);
      std::vector<double> sigma(k_);
      normalize_triplets<T>(k_, large, m_.q, sigma.data());
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

  // Matrices that the Krylov tier gave up go to the direct one. Those of float whose squares leave its range, or whose kept values span
  // orders of magnitude, so that squaring costs digits, are done again in double, which has room for both. Of double the first are scaled,
  // and the second decomposed by rounds.
  void redo(Fate fate) {
    constexpr bool wide = sizeof(T) == 8;
    std::vector<int64_t> which;
    for (int64_t b = 0; b < m_.batch; ++b)
      if (fate_[b] == fate) which.push_back(b);
    if (which.empty() || (fate == Fate::ill && wide && !rounds_)) return;
    const Tensor x = some_matrices(m_, which, fate == Fate::open ? m_.tensor().scalar_type() : at::kDouble);
    Triplets again;
    if (fate == Fate::open) {
      again = Decomposition<T>(x, k_, sign_, wants_b_, false, rounds_, Tier::direct).run();
    } else if (fate == Fate::out && wide) {
      const InUnits units(x);
      again = Decomposition<double>(units.x, k_, sign_, wants_b_, false, rounds_, Tier::direct).run();
      again.s = again.s.div(units.first.squeeze(-1)).div(units.second.squeeze(-1));
    } else if (wide) {
      again = by_rounds(x, k_, wants_b_);
    } else {
      again = Decomposition<double>(x, k_, sign_, wants_b_, false, false, Tier::direct).run();
    }
    const Tensor index = index_of(which);
    out_.s.index_copy_(0, index, again.s.to(kType<T>));
    out_.v.index_copy_(0, index, again.v.to(kType<T>));
    if (wants_b_) out_.u.index_copy_(0, index, again.u.to(kType<T>));
    for (size_t i = 0; sign_ && i < which.size(); ++i) signs(which[i]);
  }

  const Matrices m_;
  int64_t k_;
  bool sign_, rounds_, wants_b_;
  Tier tier_;
  Direct<T> direct_;
  std::vector<Fate> fate_;
  int64_t state_size_;
  Triplets out_;
  T *a_, *b_;
};

}  // namespace kdkernels::truncated_svd
