import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from chai_export.choice import Choice
from chai_export.errors import UsageError
from chai_export.op.dtypes import ELEMENT_TYPES, Dtype

EACH_TYPE = pytest.mark.parametrize("element", ELEMENT_TYPES.values(), ids=list(ELEMENT_TYPES))


@EACH_TYPE
def test_every_name_of_a_type_is_that_of_its_library(element):
    expected = np.dtype(ml_dtypes.bfloat16) if element.name == "bfloat16" else np.dtype(element.name)
    assert element.numpy == expected
    assert element.item_size == expected.itemsize == getattr(torch, element.name).itemsize
    assert element.onnx == onnx.helper.np_dtype_to_tensor_dtype(expected)
    value = ort.OrtValue.ortvalue_from_shape_and_type([1], element.onnx)
    assert value.data_type() == element.onnxruntime


@EACH_TYPE
def test_tensorrt_knows_the_types_by_these_names(element):
    lean = pytest.importorskip("tensorrt_lean_bindings")
    assert element.tensorrt in lean.DataType.__members__


@EACH_TYPE
def test_triton_knows_the_types_by_these_names(element):
    code_generator = pytest.importorskip("triton.compiler.code_generator")
    pointer = code_generator.str_to_ty(f"*{element.triton}", None)
    assert str(pointer.element_ty).replace("uint", "u").replace("int", "i") == element.triton


def test_models_are_stored_in_types_of_the_table():
    assert [ELEMENT_TYPES[dtype].name for dtype in Dtype] == ["float32", "float16", "bfloat16"]


class Colour(Choice):
    RED = "red"
    DARK_BLUE = "dark blue"


def test_a_choice_is_its_word():
    assert Colour("red") is Colour.RED
    assert f"{Colour.RED} {Colour.DARK_BLUE!s}" == "red dark blue"
    assert Colour.words() == ["red", "dark blue"]


@pytest.mark.parametrize("word", ["green", "RED", "", None, 1, ["red"]])
def test_a_word_that_is_none_of_the_choices_is_refused_with_those_there_are(word):
    with pytest.raises(UsageError, match=r"^colour is .*; give one of: red, dark blue$"):
        Colour(word)
