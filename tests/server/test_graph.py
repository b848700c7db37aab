"""No way leads from an uploaded graph to anything but tensor arithmetic, and every refusal names what is refused."""

import json
import resource
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import INPUTS, ROWS, W, X, function, method, node, refusal, whole

from lossfns.server import operations
from lossfns.server.graph import rebuild
from lossfns.server.operations import names

FUNCTIONS = names(
    """
    eval exec open compile print input vars globals setattr delattr hasattr type iter map __import__ builtins.eval
    builtins.exec builtins.open builtins.compile builtins.__import__ builtins.getattr builtins.setattr builtins.print
    os.system os.remove os.environ.get subprocess.Popen subprocess.run importlib.import_module pickle.loads pickle.load
    shutil.rmtree socket.create_connection sys.exit ctypes.CDLL io.open pathlib.Path.unlink time.sleep numpy.load
    torch.load torch.save torch.ops.aten.add torch.ops.load_library torch.hub.load torch.hub.load_state_dict_from_url
    torch._C._nn.nll_loss torch._C._jit_script_compile torch._C._cuda_init torch.classes.load_library torch.jit.load
    torch.jit.script torch.compile torch.export.load torch.package.PackageImporter torch.utils.cpp_extension.load
    torch.utils.data.DataLoader torch.multiprocessing.spawn torch.distributed.init_process_group
    torch.serialization.load torch.fx.symbolic_trace torch.autograd.grad torch.autograd.backward torch.func.grad
    torch.vmap torch.cond torch.set_default_dtype torch.set_default_device torch.set_num_threads torch.set_grad_enabled
    torch.no_grad torch.use_deterministic_algorithms torch.set_printoptions torch.cuda.synchronize
    torch.cuda.empty_cache torch.device torch.rand torch.randn torch.randint torch.randperm torch.rand_like
    torch.randn_like torch.randint_like torch.bernoulli torch.multinomial torch.normal torch.poisson torch.manual_seed
    torch.seed torch.initial_seed torch.get_rng_state torch.set_rng_state torch.nn.functional.dropout
    torch.nn.functional.gumbel_softmax torch.nn.functional.rrelu torch.dropout torch.empty torch.empty_like
    torch.empty_strided torch.as_strided torch.from_file torch.frombuffer torch.from_numpy torch.from_dlpack
    torch.tensor torch.as_tensor torch.asarray torch.nonzero torch.argwhere torch.masked_select torch.unique
    torch.bincount torch.histc torch.einsum torch.mm torch.bmm torch.tensordot torch.kron torch.cdist
    torch.matrix_power torch.linalg.svd torch.svd torch.inverse torch.conv1d torch.fft.fft torch.cartesian_prod
    torch.combinations torch.split torch.chunk torch.unbind torch.view_as_complex torch.Tensor.item torch.Tensor.tolist
    torch.Tensor.__class__ torch.is_tensor torch.typename torch.nn.Linear operator.setitem operator.delitem
    operator.attrgetter operator.methodcaller operator.itemgetter operator.call operator.iadd operator.imul
    operator.isub operator.itruediv operator.ipow operator.iconcat operator.concat operator.contains operator.lshift
    operator.rshift operator.index operator.truth operator.not_ operator.is_ operator.length_hint _operator.mul
    math.factorial math.comb math.perm math.prod math.gcd math.lcm math.isqrt math.pow math.ldexp math.fsum math.dist
    math.__loader__.load_module torch torch. .exp torch..exp getattr.__call__ torch.exp.__self__ torch.exp.__class__
    torch.abs_ torch.relu_ torch.neg_ torch.sqrt_ torch.nn.functional.relu_ torch.nn.functional.softmax.__globals__
    torch.neg.__call__ TORCH.EXP
    """
)
"""Names of functions that lead to code, files, processes, the network, state of the process, random numbers,
uninitialised memory, sizes that depend on values, work that grows faster than the numbers, or changes in place."""

METHODS = names(
    """
    item tolist numpy __array__ __class__ __dict__ __reduce__ __reduce_ex__ __getattribute__ __setattr__ __delattr__
    __getattr__ __init__ __new__ __subclasshook__ __setstate__ __deepcopy__ __dlpack__ __format__ __str__ __repr__
    __doc__ __torch_function__ __cuda_array_interface__ __bool__ __int__ __index__ __iter__ __contains__ __getitem__
    __setitem__ format join data grad grad_fn _base _grad backward register_hook register_post_accumulate_grad_hook
    retain_grad requires_grad_ requires_grad detach_ map_ map2_ apply_ share_memory_ is_shared storage untyped_storage
    _typed_storage storage_offset data_ptr const_data_ptr set_ set_data resize_ resize_as_ copy_ zero_ fill_ add_ neg_
    mul_ exp_ clamp_ masked_fill_ index_put_ scatter_ index_put put_ as_strided as_strided_ squeeze_ t_ random_ normal_
    uniform_ bernoulli bernoulli_ multinomial exponential_ geometric_ cuda cpu xpu ipu mps to_sparse to_dense to_mkldnn
    pin_memory is_pinned record_stream device get_device type new new_empty new_tensor new_empty_strided empty_like
    unbind split chunk tensor_split nonzero argwhere masked_select unique bincount histc mm bmm einsum svd inverse
    matrix_power cholesky stft fft names rename refine_names coalesce values indices sparse_mask as_subclass
    module_load dim_order reinforce smm unfold resize __init_subclass__ sum.__self__ view.__func__
    """
)
"""Names of methods and of attributes that lead out of tensor arithmetic, or change a tensor in place."""

ATTRIBUTES = names(
    """
    data grad grad_fn _base device __class__ __dict__ __doc__ __module__ __reduce__ real imag H is_leaf requires_grad
    storage untyped_storage item numpy tolist backward register_hook names layout is_cuda itemsize nbytes sum exp
    _backward_hooks __init__.__globals__ shape.__class__ dtype.__reduce__ func_globals
    """
)


def test_no_function_outside_of_the_table_is_reached_and_the_message_names_it(tmp_path: Path) -> None:
    for target in FUNCTIONS:
        message = refusal(whole(function(target, X, W)))
        assert f"nodes[2] y ({target})" in message and repr(target) in message, (target, message)
        assert target not in operations.FUNCTIONS
    assert not refusal(whole(function("torch.mul", X, W)))
    path = tmp_path / "touched"
    for target in ("os.system", "builtins.eval", "builtins.open", "torch.save"):
        assert target in refusal(whole(function(target, f"touch {path}", "w")))
    assert not path.exists()


def test_no_method_outside_of_the_table_is_reached_and_the_message_names_it() -> None:
    for target in METHODS:
        message = refusal(whole(method(target, X)))
        assert f"nodes[2] y ({target})" in message and repr(target) in message, (target, message)
    assert "Nothing is changed in place: take add" in refusal(whole(method("add_", X, 1)))
    assert not refusal(whole(method("exp", X)))


def test_no_attribute_but_shape_and_dtype_is_read_and_the_message_names_it() -> None:
    for name in ATTRIBUTES:
        assert repr(name) in refusal(whole(function("getattr", X, name))), name
    for args in ([X], [X, "shape", 0], ["shape", X], [X, X], [X, ["shape"]], [X, {"dtype": "float32"}], []):
        assert "an attribute among" in refusal(whole(function("getattr", *args))), args
    assert "no values" in refusal(whole(function("getattr", X, "values")))
    assert not refusal(whole(function("getattr", X, "shape")))


def test_nothing_in_the_tables_changes_in_place_draws_at_random_or_names_private_parts() -> None:
    builtin = {f"torch._C._nn.{name}" for name in operations.BUILT_IN_FUNCTIONAL}
    for name in {*operations.FUNCTIONS, *operations.METHODS} - {"operator.and_", "operator.or_"} - builtin:
        assert not name.endswith("_") and "._" not in name and not name.startswith("_"), name
        assert not any(word in name for word in ("rand", "seed", "empty", "dropout", "load", "save", "strided")), name


MASK, WHOLE, COLUMN = {"ref": "mask"}, {"ref": "whole"}, {"ref": "column"}
EXAMPLES: list[list[Any]] = [
    *([X], [X, W], [X, 0], [X, 1, 2], [X, W, 0.5], [X, [4]], [X, [1, 2]], [X, [2, 2]], [X, 0, [2, 2]], [X, 0, 0, 2]),
    *(
        [X, MASK],
        [X, MASK, 0.0],
        [X, X, W],
        [MASK, X, W],
        [WHOLE],
        [WHOLE, WHOLE],
        [X, WHOLE, 0],
        [X, 0, {"ref": "zeros"}],
    ),
    *([X, 0, {"ref": "zeros"}, W], [COLUMN], [COLUMN, 0, 1], [COLUMN, [1, 0]], [[X, W]], [4], [[4], 1.0], [0, 1, 4]),
    *([{"ref": "probability"}, {"ref": "probability"}], [1.5], [X, "shape"], [X, {"dtype": "float64"}], [COLUMN, W, 0]),
    *([X, [4], 1.0], [{"ref": "probability"}, W], [X, {"ref": "zeros"}]),
]
"""Arguments, of which some fit each operation."""
EXAMPLE_NODES = [
    function("operator.gt", W, 0, name="mask"),
    method("long", W, name="whole"),
    method("view", X, 4, 1, name="column"),
    method("sigmoid", X, name="probability"),
    function("torch.zeros", 4, dtype={"dtype": "int64"}, name="zeros"),
]


@pytest.mark.filterwarnings("ignore:Implicit dimension choice", "ignore:reduction")
def test_every_operation_in_the_tables_runs() -> None:
    """A name that no arguments fit would be of no use to a loss."""
    for op, table in (("call_function", operations.FUNCTIONS), ("call_method", operations.METHODS)):
        for target in table:
            graphs = (whole(*EXAMPLE_NODES, node(op, target, *args)) for args in EXAMPLES)
            keyed = (whole(*EXAMPLE_NODES, node(op, target, *args, dim=0)) for args in EXAMPLES)
            assert any(not refusal(graph) for graph in chain(graphs, keyed)), target


NUMBER = 2**63
ARGUMENTS: dict[str, tuple[Any, str]] = {
    "text for a device": (method("to", X, "cuda"), "got 'cuda'"),
    "text for a dtype": (method("to", X, "float32"), "got 'float32'"),
    "a device": (method("to", X, {"device": "cuda"}), "'device': 'cuda'"),
    "the host as a device": (method("to", X, {"device": "cpu"}), "'device': 'cpu'"),
    "the number of a device": (method("to", X, 0), "to() takes a dtype or a tensor"),
    "a device by keyword": (method("to", X, device={"device": "cpu"}), "got 'device'"),
    "text for a device by keyword": (function("torch.zeros", 3, device="cuda"), "got 'device'"),
    "a layout": (function("torch.zeros", 3, layout={"layout": "sparse_coo"}), "got 'layout'"),
    "a memory format": (method("contiguous", X, {"memory_format": "channels_last"}), "'memory_format'"),
    "a tensor to write to": (function("torch.exp", X, out=X), "got 'out'"),
    "a generator": (function("torch.zeros", 3, generator=None), "got 'generator'"),
    "a tensor with a gradient": (function("torch.zeros", 3, requires_grad=True), "got 'requires_grad'"),
    "pinned memory": (function("torch.zeros", 3, pin_memory=True), "got 'pin_memory'"),
    "in place by keyword": (function("torch.nn.functional.relu", X, inplace=True), "got 'inplace'"),
    "in place by a number": (function("torch.nn.functional.relu", X, inplace=1), "got 'inplace'"),
    "in place by position": (function("torch.nn.functional.relu", X, True), "takes 1 arguments by position"),
    "in place after a setting": (function("torch.nn.functional.elu", X, 1.0, True), "takes 1 arguments by position"),
    "a mode": (function("torch.nn.functional.pad", X, [1, 1], mode="reflect"), "got 'mode'"),
    "a complex dtype": (method("to", X, {"dtype": "complex64"}), "'dtype': 'complex64'"),
    "a quantized dtype": (method("to", X, {"dtype": "qint8"}), "'dtype': 'qint8'"),
    "a dtype that is a path": (method("to", X, {"dtype": "load"}), "'dtype': 'load'"),
    "a complex result": (function("operator.pow", -2.0, 0.5), "a complex"),
    "text as a number": (function("torch.add", X, "1"), "got '1'"),
    "text to format": (function("operator.mod", "%s" * 9, X), "'%s"),
    "text to repeat": (function("operator.mul", "a", 10**9), "got 'a'"),
    "text to join": (function("operator.add", "a", "b"), "got 'a'"),
    "text in a list": (function("torch.cat", [X, "a"]), "got 'a'"),
    "a text by keyword": (method("sum", X, dim="a"), "'a'"),
    "an unknown way to round": (function("torch.div", X, W, rounding_mode="os"), "got 'os'"),
    "an index of text": (function("operator.getitem", X, "__class__"), "'__class__'"),
    "an index of text in a tuple": (function("operator.getitem", X, {"tuple": ["a"]}), "got 'a'"),
    "a slice of text": (function("operator.getitem", X, {"slice": ["a", None, None]}), "got 'a'"),
    "a slice of a list": (function("operator.getitem", X, {"slice": [[1], None, None]}), "'slice': [[1]"),
    "a slice of two": (function("operator.getitem", X, {"slice": [1, 2]}), "'slice': [1, 2]"),
    "an index of a truth value": (function("operator.getitem", X, True), "a bool is no index"),
    "an index of a float": (function("operator.getitem", X, 1.5), "a float is no index"),
    "an index beyond the end": (function("operator.getitem", X, 9), "out of bounds"),
    "an item of a number": (function("operator.getitem", 5, 0), "expected a tensor, got a int"),
    "an item of a list": (function("operator.getitem", [1, 2], 0), "expected a tensor, got a list"),
    "a list to repeat": (function("operator.mul", [1], 10**9), "not a list"),
    "tuples to join": (function("operator.add", {"tuple": [1]}, {"tuple": [2]}), "not a tuple"),
    "a power without end": (function("operator.pow", 2, 10**9), "a power beyond all numbers"),
    "a power of powers": (function("operator.pow", 10**18, 10**18), "a power beyond all numbers"),
    "a power above 2**63": (function("operator.pow", 2, 64), "a whole number below 2**63"),
    "a product above 2**63": (function("operator.mul", 2**62, 4), "a whole number below 2**63"),
    "a large whole number": (function("operator.mul", X, NUMBER), "a whole number below 2**63"),
    "a small whole number": (function("operator.mul", X, -NUMBER), "a whole number below 2**63"),
    "a division by zero": (function("operator.truediv", 1, 0), "division by zero"),
    "math of a tensor": (function("math.exp", X), "math takes numbers"),
    "math beyond the floats": (function("math.exp", 10**6), "math range error"),
    "math of text": (function("math.floor", "9"), "got '9'"),
    "a ceiling beyond all numbers": (function("math.ceil", 1e300), "a whole number below 2**63"),
    "a ceiling of infinity": (function("math.ceil", {"float": "inf"}), "cannot convert float infinity"),
    "a float of another name": (function("torch.mul", X, {"float": "1e5"}), "'float': '1e5'"),
    "a method of a number": (method("exp", 5), "expected a tensor, got a int"),
    "a method of nothing": (method("exp"), "missing 1 required positional argument"),
    "a method of a list": (method("sum", [X]), "expected a tensor, got a list"),
    "a mask as an index": (function("operator.getitem", W, {"ref": "mask"}), "use torch.where(mask, x, 0)"),
    "a mask of bytes as an index": (function("operator.getitem", W, {"ref": "bytes"}), "use torch.where(mask, x, 0)"),
    "a size that is a value": (function("torch.zeros", {"ref": "one"}), "y (torch.zeros)"),
    "repeats that are values": (method("repeat_interleave", X, {"ref": "whole"}), "repeats must be one whole number"),
    "where without values": (function("torch.where", {"ref": "mask"}), "a size that depends on no value"),
    "shapes that do not fit": (function("torch.add", X, {"ref": "three"}), "broadcast"),
    "an unknown reference": (function("torch.exp", {"ref": "nobody"}), "got 'nobody'"),
    "a reference to a later node": (function("torch.exp", {"ref": "total"}), "got 'total'"),
    "a reference to itself": (function("torch.exp", {"ref": "y"}), "got 'y'"),
    "a reference that is a list": (function("torch.exp", {"ref": ["logprobs"]}), "'ref': ['logprobs']"),
    "a dict": (function("torch.exp", {"dict": {"a": 1}}), "'dict'"),
    "two kinds at once": (function("torch.exp", {"ref": "logprobs", "tuple": []}), "'ref': 'logprobs'"),
    "an object": (function("torch.exp", {"py/object": "os.system"}), "'py/object': 'os.system'"),
    "an ellipsis that is none": (function("operator.getitem", X, {"ellipsis": 1}), "'ellipsis': 1"),
    "a keyword of another function": (method("exp", X, dim=0), "y (exp)"),
}
"""Arguments that no operation may get, and a part of the message."""
BEFORE = [
    function("operator.gt", W, 0, name="mask"),
    method("to", W, {"dtype": "uint8"}, name="bytes"),
    method("long", W, name="whole"),
    method("sum", {"ref": "whole"}, name="one"),
    function("torch.zeros", 3, name="three"),
]


def test_no_argument_chooses_a_device_writes_in_place_or_reaches_beyond_tensors_and_numbers() -> None:
    for name, (attack, expected) in ARGUMENTS.items():
        message = refusal(whole(*BEFORE, attack))
        assert f"y ({attack['target']})" in message and expected in message, (name, message)
    assert not refusal(whole(*BEFORE))


def repeated(count: int, target: str, *args: Any) -> list[dict[str, Any]]:
    """Operations of which each takes the result of the one before it, ``"it"`` in ``args``."""
    nodes = []
    for i in range(count):
        it = {"ref": f"y{i - 1}"} if i else X
        nodes.append(function(target, *json.loads(json.dumps([*args]).replace('"it"', json.dumps(it))), name=f"y{i}"))
    return nodes


EXPANDED = method("expand", {"ref": "column"}, 2**14, 2**14)
BOMBS: dict[str, list[dict[str, Any]]] = {
    "zeros": [function("torch.zeros", 2**40)],
    "zeros of two sizes": [function("torch.zeros", [2**31, 2**31])],
    "zeros beyond all numbers": [function("torch.zeros", [2**62, 2**62])],
    "ones": [function("torch.ones", 2**36)],
    "full": [function("torch.full", [2**36], 1.0)],
    "eye": [function("torch.eye", 2**20)],
    "arange": [function("torch.arange", 2**40)],
    "arange of small steps": [function("torch.arange", 0, 1, 1e-13)],
    "linspace": [function("torch.linspace", 0, 1, 2**40)],
    "new_ones": [method("new_ones", X, [2**36])],
    "new_full": [method("new_full", X, [2**36], 0.0)],
    "expand": [method("expand", X, 2**40, 4)],
    "broadcast_to": [function("torch.broadcast_to", X, [2**40, 4])],
    "repeat": [method("repeat", X, 2**40)],
    "tile": [function("torch.tile", X, [2**40])],
    "repeat_interleave": [method("repeat_interleave", X, 2**36)],
    "pad": [function("torch.nn.functional.pad", X, [2**40, 0])],
    "doubling by cat": repeated(60, "torch.cat", ["it", "it"]),
    "doubling by stack": repeated(60, "torch.stack", ["it", "it"]),
    "squaring by outer": [
        n
        for i in range(8)
        for n in (
            function("torch.outer", *[{"ref": f"f{i - 1}"} if i else X] * 2, name=f"y{i}"),
            method("flatten", {"ref": f"y{i}"}, name=f"f{i}"),
        )
    ],
    "squaring by broadcasting": [
        n
        for i in range(8)
        for n in (
            method("unsqueeze", {"ref": f"f{i - 1}"} if i else X, 1, name=f"c{i}"),
            function("operator.mul", {"ref": f"c{i}"}, {"ref": f"f{i - 1}"} if i else X, name=f"y{i}"),
            method("flatten", {"ref": f"y{i}"}, name=f"f{i}"),
        )
    ],
    "an index that repeats": [
        function("torch.zeros", [2**30], dtype={"dtype": "int64"}, name="many"),
        function("operator.getitem", X, {"ref": "many"}),
    ],
    "gather": [method("expand", W, 2**30, 4, name="index"), function("torch.gather", X, 0, {"ref": "index"})],
    "many of moderate size": [
        method("reshape", X, [4, 1], name="column"),
        *(method("expand", {"ref": "column"}, 4, 2**20, name=f"y{i}") for i in range(99)),
    ],
    "a large tensor that is read often": [
        function("torch.zeros", [2**24], name="large"),
        *(method("sum", {"ref": "large"}, name=f"y{i}") for i in range(99)),
    ],
    "two matrices": [
        function("torch.zeros", [2**10, 2**10], name="matrix"),
        function("operator.matmul", {"ref": "matrix"}, {"ref": "matrix"}),
    ],
    "a metric": [function("torch.ones", 2**36), method("sum", {"ref": "y"}, name="metric")],
}
"""Graphs that would need more memory or time than any loss."""


def test_no_graph_allocates_memory_or_takes_time_out_of_proportion_to_its_inputs() -> None:
    """Nothing is allocated: every size is known before. The largest resident size is in KiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, nodes in BOMBS.items():
        message = refusal(whole(*nodes))
        assert message.startswith("nodes["), (name, message)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10
    )  # KiB: all of them are refused empty
    rows = torch.full((2**14,), -1.0), torch.ones(2**14)
    assert not refusal(whole(*(function("torch.mul", X, W, name=f"y{i}") for i in range(500))), rows=rows)


def test_the_inputs_of_a_graph_stay_as_they_are() -> None:
    """No operation writes: a chain of views and arithmetic leaves the arguments bit for bit."""
    rows = tuple(x.clone() for x in ROWS)
    nodes = [
        method("view", X, -1, name="view"),
        method("add", {"ref": "view"}, 1, name="more"),
        method("masked_fill", X, {"ref": "mask"}, 0, name="filled"),
        function("torch.nn.functional.relu", X, inplace=False, name="relu"),
        method("scatter", X, 0, {"ref": "whole"}, W, name="scattered"),
    ]
    rebuild(whole(*BEFORE[:3], *nodes), INPUTS)(*rows)
    assert all(torch.equal(a, b) for a, b in zip(rows, ROWS))
