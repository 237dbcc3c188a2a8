// The stages of truncated_svd, each as a separate op for the tests: kdkernels::_svd_<stage>. They
// take batches of any size, in float or double.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../common/check.h"
#include "../truncated_svd/backward.h"

namespace kdkernels::truncated_svd {
namespace {

using at::Tensor;

// Calls body with a null pointer to the type of x.
template <typename Body>
void with_type(const Tensor& x, Body&& body) {
  x.scalar_type() == at::kDouble ? body(static_cast<double*>(nullptr)) : body(static_cast<float*>(nullptr));
}

void check_like_d(const Tensor& x, const char* name, const Tensor& d, at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(x.scalar_type() == d.scalar_type(), name, " must have the dtype of d, ", d.scalar_type(), ", got ", x.scalar_type());
  check_shape(x, name, shape);
}

// Checks that x is [B, m, n] with m, n >= 1.
void check_matrices(const Tensor& x, const char* name) {
  check_floating(x, name);
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) > 0 && x.size(2) > 0, name, " must be [B, m, n] with m, n >= 1, got ", x.sizes());
}

// Checks the diagonal d [B, p] and the off-diagonal e [B, p - 1] of tridiagonal matrices, p >= 1,
// of the same dtype.
void check_tridiagonal(const Tensor& d, const Tensor& e, bool double_only) {
  const at::ScalarType dtype = d.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kDouble || (dtype == at::kFloat && !double_only), "d must be float64", double_only ? "" : " or float32",
                   ", got ", dtype);
  TORCH_CHECK_VALUE(d.dim() == 2 && d.size(1) > 0, "d must be [B, p] with p >= 1, got ", d.sizes());
  check_like_d(e, "e", d, {d.size(0), d.size(1) - 1});
}

// Converts x [B, n], contiguous, to lanes, with samples first, first + 1, ... (0 past the end), and
// back.
template <typename T>
void to_lanes(const Tensor& x, int64_t first, Vec<T>* lanes) {
  const int64_t n = x.size(1);
  for (int64_t i = 0; i < n; ++i)
    for (int l = 0; l < kLanes<T>; ++l) lanes[i][l] = first + l < x.size(0) ? x.const_data_ptr<T>()[(first + l) * n + i] : T(0);
}
template <typename T>
void from_lanes(const Vec<T>* lanes, int64_t first, const Tensor& x) {
  const int64_t n = x.size(1);
  for (int64_t i = 0; i < n; ++i)
    for (int l = 0; l < kLanes<T> && first + l < x.size(0); ++l) x.mutable_data_ptr<T>()[(first + l) * n + i] = lanes[i][l];
}

// The lower triangle of G = M M^T [B, p, p].
Tensor gram_stage(const Tensor& x) {
  check_matrices(x, "x");
  const Matrices m(x);
  const Tensor out = at::zeros({m.batch, m.p, m.p}, x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  with_type(out, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Reader<T> reader(m, gram_columns<T>(m));
    const int64_t stride = padded<T>(m.p);
    Buffer<T> matrix(m.p * stride);
    for (int64_t b = 0; b < m.batch; ++b) {
      gram<T>(reader, m, b, 1, matrix.get(), stride);
      for (int64_t i = 0; i < m.p; ++i) std::copy_n(matrix.get() + i * stride, i + 1, out.mutable_data_ptr<T>() + (b * m.p + i) * m.p);
    }
  });
  return out;
}

// Symmetric g [B, p, p], of norm about 1 -> d [B, p], e [B, p - 1], Q [B, p, p].
std::tuple<Tensor, Tensor, Tensor> tridiagonal_stage(const Tensor& g) {
  check_matrices(g, "g");
  TORCH_CHECK_TYPE(g.scalar_type() == at::kDouble || g.scalar_type() == at::kFloat, "g must be float64 or float32, got ", g.scalar_type());
  TORCH_CHECK_VALUE(g.size(1) == g.size(2), "g must be [B, p, p], got ", g.sizes());
  const int64_t batch = g.size(0), p = g.size(1);
  const Tensor d = at::empty({batch, p}, g.options()), e = at::empty({batch, p - 1}, g.options()),
               q = at::empty({batch, p * p}, g.options());
  const Tensor input = g.contiguous();
  with_type(g, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int lanes = kLanes<T>;
    const int64_t stride = padded<T>(p);
    Buffer<T> matrices(lanes * p * stride);
    Buffer<Vec<T>> a(triangle(p)), t(7 * p), z(p * p);  // t: d, e, tau and working memory
    for (int64_t first = 0; first < batch; first += lanes) {
      std::fill_n(matrices.get(), lanes * p * stride, T(0));
      for (int64_t l = 0; l < lanes && first + l < batch; ++l)
        for (int64_t i = 0; i < p; ++i)
          std::copy_n(input.const_data_ptr<T>() + ((first + l) * p + i) * p, p, matrices.get() + (l * p + i) * stride);
      interleave_triangle<T>(matrices.get(), p, stride, a.get());
      Vec<T>*dl = t.get(), *el = dl + p, *tau = el + p;
      tridiagonalize<T>(p, a.get(), dl, el, tau, tau + p);
      // Q times the unit vectors. They are stored by column; the result is transposed at the end.
      for (int64_t j = 0; j < p; ++j)
        for (int64_t i = 0; i < p; ++i) z.get()[j * p + i] = simd::splat<T>(i == j ? 1 : 0);
      apply_q<T>(p, a.get(), tau, false, p, z.get());
      from_lanes<T>(dl, first, d);
      from_lanes<T>(el, first, e);
      from_lanes<T>(z.get(), first, q);
    }
  });
  return {d, e, q.view({batch, p, p}).transpose(1, 2)};
}

// d [B, p], e [B, p - 1] of positive semi-definite matrices -> the k largest eigenvalues.
Tensor bisection_stage(const Tensor& d_in, const Tensor& e_in, int64_t k) {
  check_tridiagonal(d_in, e_in, false);
  TORCH_CHECK_VALUE(k >= 1 && k <= d_in.size(1), "k must lie in [1, p], got ", k, " for d of shape ", d_in.sizes());
  const Tensor d = d_in.contiguous(), e = e_in.contiguous();
  const int64_t batch = d.size(0), p = d.size(1);
  const Tensor out = at::empty({batch, k}, d.options());
  with_type(d, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Buffer<Vec<T>> memory(3 * p + k + 3);
    Vec<T>*dl = memory.get(), *el = dl + p, *e2 = el + p, *lambda = e2 + p;
    for (int64_t first = 0; first < batch; first += kLanes<T>) {
      to_lanes<T>(d, first, dl);
      to_lanes<T>(e, first, el);
      Vec<T> high{};
      for (int64_t i = 0; i < p; ++i) {
        const Vec<T> e_left = i > 0 ? abs<T>(el[i - 1]) : Vec<T>{}, e_right = i + 1 < p ? abs<T>(el[i]) : Vec<T>{};
        e2[i] = e_left * e_left;
        high = simd::max(high, dl[i] + e_left + e_right);
      }
      largest_eigenvalues<T>(p, dl, e2, Vec<T>{}, high * T(1.001), k, lambda);
      from_lanes<T>(lambda, first, out);
    }
  });
  return out;
}

// d [B, p], e [B, p - 1], lambda [B, k], float64 -> refined lambda, vectors [B, k, p].
std::tuple<Tensor, Tensor> inverse_iteration_stage(const Tensor& d_in, const Tensor& e_in, const Tensor& lambda_in) {
  check_tridiagonal(d_in, e_in, true);
  TORCH_CHECK_VALUE(lambda_in.dim() == 2 && lambda_in.size(1) > 0, "lambda must be [B, k] with k >= 1, got ", lambda_in.sizes());
  check_like_d(lambda_in, "lambda", d_in, {d_in.size(0), lambda_in.size(1)});
  const Tensor d = d_in.contiguous(), e = e_in.contiguous(), lambda = lambda_in.contiguous();
  const int64_t batch = d.size(0), p = d.size(1), k = lambda.size(1);
  const Tensor values = at::empty_like(lambda), vectors = at::empty({batch, k * p}, d.options());
  const int64_t stride = padded<double>(p);
  Buffer<Doubles> x(p);
  Buffer<TridiagonalLU<1>::Row> rows(p);
  Buffer<double> start(p + k);
  fill_start_vectors(p + k, start.get());
  ClusterWorkspace work(p, k);
  for (int64_t b = 0; b < batch; ++b) {
    const double *db = d.const_data_ptr<double>() + b * p, *eb = e.const_data_ptr<double>() + b * (p - 1),
                 *shifts = lambda.const_data_ptr<double>() + b * k;
    double *value = values.mutable_data_ptr<double>() + b * k, *out = vectors.mutable_data_ptr<double>() + b * k * p;
    for (int64_t j = 0; j < k; ++j) {
      Doubles shift = simd::splat<double>(shifts[j] + kShiftOffset<float> * shifts[0]);
      for (int64_t i = 0; i < p; ++i) x.get()[i] = simd::splat<double>(start.get()[j + i]);
      inverse_iteration<1>(p, db, eb, 3, &shift, x.get(), 1, rows.get());
      value[j] = shift[0];
      double* row = work.vectors.get() + j * stride;
      std::fill(row, row + stride, 0.0);
      for (int64_t i = 0; i < p; ++i) row[i] = x.get()[i][0];
    }
    improve_clusters<float>(p, db, eb, k, shifts, kCluster<float> * shifts[0], value, work);
    for (int64_t j = 0; j < k; ++j) std::copy_n(work.vectors.get() + j * stride, p, out + j * p);
  }
  return {values, vectors.view({batch, k, p})};
}

// Re[(lambda + i eps - T)^-1] r for d [B, p], e [B, p - 1], lambda [B], r [B, p], float64.
Tensor resolvent_stage(const Tensor& d_in, const Tensor& e_in, const Tensor& lambda_in, double eps, const Tensor& r_in) {
  check_tridiagonal(d_in, e_in, true);
  check_like_d(lambda_in, "lambda", d_in, {d_in.size(0)});
  check_like_d(r_in, "r", d_in, d_in.sizes());
  const Tensor d = d_in.contiguous(), e = e_in.contiguous(), lambda = lambda_in.contiguous(), r = r_in.contiguous();
  const int64_t batch = d.size(0), p = d.size(1);
  const Tensor out = at::empty_like(r);
  Buffer<Doubles> memory(3 * p + 1);
  Buffer<ResolventRow> rows(p);
  Doubles *dl = memory.get(), *el = dl + p, *shift = el + p, *x = shift + 1;
  for (int64_t first = 0; first < batch; first += kLanes<double>) {
    to_lanes<double>(d, first, dl);
    to_lanes<double>(e, first, el);
    to_lanes<double>(lambda.view({batch, 1}), first, shift);
    to_lanes<double>(r, first, x);
    resolvent(p, dl, el, *shift, simd::splat<double>(eps), x, rows.get());
    from_lanes<double>(x, first, out);
  }
  return out;
}

// Decomposes x in float with the given tier, whatever its shape: s [B, k], v [B, k, N].
std::tuple<Tensor, Tensor> tier_stage(const Tensor& x, int64_t k, bool krylov) {
  check_matrices(x, "x");
  TORCH_CHECK_VALUE(k >= 1 && k <= std::min(x.size(1), x.size(2)), "k must lie in [1, min(m, n)], got ", k, " for x of shape ", x.sizes());
  Triplets t = Decomposition<float>(x, k, true, false, false, true, krylov ? Tier::krylov : Tier::direct).run();
  return {t.s, t.v};
}

// The gradient of x [B, M, N], float32, for the upstream gradients of v [B, N, k], by conjugate
// gradients, and the number of matrices for which they do not converge.
std::tuple<Tensor, int64_t> conjugate_gradients_stage(const Tensor& grad_v, const Tensor& x) {
  check_matrices(x, "x");
  check_shape(grad_v, "grad_v", {x.size(0), x.size(2), grad_v.size(-1)});
  const Triplets t = Decomposition<float>(x, grad_v.size(-1), true, false, false, true, Tier::krylov).run();
  std::vector<int64_t> unsolved;
  const Tensor gradient = Backward<float>({{}, {}, grad_v.mT()}, x, t, 1e-6, Tier::krylov).run(&unsolved);
  return {gradient, static_cast<int64_t>(unsolved.size())};
}

}  // namespace
}  // namespace kdkernels::truncated_svd

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("_svd_tier(Tensor x, int k, bool krylov) -> (Tensor s, Tensor v)");
  m.def("_svd_conjugate_gradients(Tensor grad_v, Tensor x) -> (Tensor gradient, int unsolved)");
  m.def("_svd_gram(Tensor x) -> Tensor");
  m.def("_svd_tridiagonal(Tensor g) -> (Tensor d, Tensor e, Tensor q)");
  m.def("_svd_bisection(Tensor d, Tensor e, int k) -> Tensor");
  m.def("_svd_inverse_iteration(Tensor d, Tensor e, Tensor lambda) -> (Tensor values, Tensor vectors)");
  m.def("_svd_resolvent(Tensor d, Tensor e, Tensor lambda, float eps, Tensor r) -> Tensor");
}

TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("_svd_tier", kdkernels::truncated_svd::tier_stage);
  m.impl("_svd_conjugate_gradients", kdkernels::truncated_svd::conjugate_gradients_stage);
  m.impl("_svd_gram", kdkernels::truncated_svd::gram_stage);
  m.impl("_svd_tridiagonal", kdkernels::truncated_svd::tridiagonal_stage);
  m.impl("_svd_bisection", kdkernels::truncated_svd::bisection_stage);
  m.impl("_svd_inverse_iteration", kdkernels::truncated_svd::inverse_iteration_stage);
  m.impl("_svd_resolvent", kdkernels::truncated_svd::resolvent_stage);
}
