// The row kernels of every storage.
#pragma once

#include "op/cpu/float_rows.h"
#include "op/cpu/int4_rows.h"
#include "op/cpu/int8_rows.h"

namespace chai {
namespace CHAI_ISA {

constexpr RowKernels kFloat32Rows = FloatRows<float>::kernels();
constexpr RowKernels kFloat16Rows = FloatRows<Float16>::kernels();
constexpr RowKernels kBfloat16Rows = FloatRows<Bfloat16>::kernels();
constexpr RowKernels kInt8Rows = QuantisedRows<Int8Codes>::kernels();
constexpr RowKernels kInt4Rows = QuantisedRows<Int4Codes>::kernels();

}  // namespace CHAI_ISA
}  // namespace chai
