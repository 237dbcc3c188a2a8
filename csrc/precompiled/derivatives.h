// The torch headers included by the sources that define schemas and derivatives, precompiled once
// for all of them (see setup.py). Each source still includes the headers that it uses.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>
