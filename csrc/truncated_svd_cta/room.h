// The working memory of one matrix: what fits lies in shared memory, the rest in a workspace.
#pragma once

#include "arithmetic.h"
#include "plan.h"

namespace kdkernels::truncated_svd::gpu {

// Hands out memory in pieces.
class Pieces {
 public:
  KDKERNELS_GPU explicit Pieces(void* from) : at_(static_cast<char*>(from)) {}
  template <typename V>
  KDKERNELS_GPU V* take(int64_t count) {
    V* result = reinterpret_cast<V*>(at_);
    at_ += aligned(count * static_cast<int64_t>(sizeof(V)));
    return result;
  }

 private:
  char* at_;
};

template <typename T>
struct Room {
  KDKERNELS_GPU Room(const Plan& plan, int p, int k, bool backward, char* shared, char* workspace) {
    Pieces pieces(shared + kScratch);
    T* small = pieces.take<T>(4 * p + tile_columns(p) * k);
    d = small, e = d + p, tau = e + p, w = tau + p, along = w + p;
    double* numbers = pieces.take<double>(6 * k);
    lambda = numbers, dots = lambda + k, low = dots + k, high = low + k, sigma = high + k, squares = sigma + k;
    int* integers = pieces.take<int>(kMostThreads + 2 * k);
    above = integers, order = above + kMostThreads + k;
    char* phase = pieces.take<char>(plan.vectors_shared && plan.eigen > plan.tiles ? plan.eigen : plan.tiles);
    Pieces outside(workspace);
    Pieces& of_vectors = plan.vectors_shared ? pieces : outside;
    vectors = of_vectors.take<T>(int64_t(backward ? 3 : 1) * k * tile_stride(p));
    products = backward ? of_vectors.take<double>(3 * int64_t(k) * k) : nullptr;
    tiles = reinterpret_cast<T*>(phase);
    char* eigen = plan.vectors_shared ? phase : outside.take<char>(plan.eigen);
    parts = reinterpret_cast<T*>(eigen);
    x = reinterpret_cast<double*>(eigen), rows = x + int64_t(k) * p;
    matrix = reinterpret_cast<T*>((plan.matrix_shared ? pieces : outside).take<char>(plan.matrix));
  }

  T *d, *e, *tau, *w;                                    // of T: its diagonals [p]; of Q: factors [p]; a vector [p]
  T* along;                                              // [columns of a tile][k]
  double *lambda, *dots, *low, *high, *sigma, *squares;  // [k]
  double* products;                                      // [3][k][k], backward
  int *above, *order;                                    // [threads or k], [k]
  T *tiles, *parts;                                      // [stages][columns][tile_stride]; [kParts][p]
  double *x, *rows;                                      // [k][p]; rows of eliminations
  T* vectors;                                            // [vectors k][tile_stride]
  T* matrix;                                             // [p][matrix_stride]
};

}  // namespace kdkernels::truncated_svd::gpu
