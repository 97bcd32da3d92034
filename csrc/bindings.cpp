// The Python face of token_loader.h: the module gpt2._token_loader. Only gpt2/data/loader.py
// imports it.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "token_loader.h"

namespace py = pybind11;
using token_loader::FileError;
using token_loader::ShardSpec;
using token_loader::TokenLoader;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
void check_shape(const Array<T>& array, const char* name, int64_t rows, int64_t block_size) {
  if (array.ndim() != 2 || array.shape(0) != rows || array.shape(1) != block_size) {
    throw std::invalid_argument(std::string(name) + " must have the shape (" +
                                std::to_string(rows) + ", " + std::to_string(block_size) + ")");
  }
}

void fill(const TokenLoader& loader, const Array<int64_t>& samples, Array<int64_t> x,
          Array<int64_t> y, std::optional<Array<int32_t>> doc_start, int64_t eot) {
  if (samples.ndim() != 1) throw std::invalid_argument("samples must have one dimension");
  const int64_t rows = samples.shape(0);
  check_shape(x, "x", rows, loader.block_size());
  check_shape(y, "y", rows, loader.block_size());
  if (doc_start) check_shape(*doc_start, "doc_start", rows, loader.block_size());
  // mutable_data throws ValueError where the array is read-only.
  int64_t *x_data = x.mutable_data(), *y_data = y.mutable_data();
  int32_t* doc_start_data = doc_start ? doc_start->mutable_data() : nullptr;
  py::gil_scoped_release release;
  loader.fill(samples.data(), rows, x_data, y_data, doc_start_data, eot);
}

void prefetch(const TokenLoader& loader, const Array<int64_t>& samples) {
  py::gil_scoped_release release;
  loader.prefetch(samples.data(), samples.size());
}

}  // namespace

PYBIND11_MODULE(_token_loader, m) {
  m.doc() = "Memory-mapped token windows; see csrc/token_loader.h.";
  m.attr("sources") = SOURCES;

  // std::invalid_argument is ValueError already.
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const FileError& e) {
      py::object error =
          py::reinterpret_borrow<py::object>(PyExc_OSError)(e.error_number, e.what(), e.path);
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
    }
  });

  py::class_<TokenLoader>(m, "TokenLoader")
      .def(py::init([](const std::vector<std::tuple<std::string, int64_t, int64_t>>& shards,
                       int64_t block_size, uint64_t seed, bool shuffle, int64_t vocab_size) {
             std::vector<ShardSpec> specs;
             specs.reserve(shards.size());
             for (const auto& [path, offset, n_tokens] : shards)
               specs.push_back({path, offset, n_tokens});
             return new TokenLoader(specs, block_size, seed, shuffle, vocab_size);
           }),
           py::arg("shards"), py::arg("block_size"), py::arg("seed"), py::arg("shuffle"),
           py::arg("vocab_size"))
      .def_property_readonly("n_tokens", &TokenLoader::n_tokens)
      .def_property_readonly("n_windows", &TokenLoader::n_windows)
      .def("window_start", &TokenLoader::window_start, py::arg("sample"))
      .def("fill", &fill, py::arg("samples"), py::arg("x").noconvert(),
           py::arg("y").noconvert(), py::arg("doc_start").noconvert() = py::none(),
           py::arg("eot") = -1)
      .def("prefetch", &prefetch, py::arg("samples"));
}
