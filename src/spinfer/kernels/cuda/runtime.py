"""Loading and launching: cubins through cuda-core, launches through cuda-bindings on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spinfer.errors import SpinferError
from spinfer.kernels.cuda.compile import KernelSource, cubin
from spinfer.kernels.cuda.configs import DeviceTraits

_MAX_STREAMS = 32
_MAX_TENSOR_MAPS = 4096


class LaunchError(SpinferError, RuntimeError):
    """The driver refused to load or launch a kernel."""


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _check(result: tuple[Any, ...], what: str) -> Any:
    status = result[0]
    if int(status) != 0:
        raise LaunchError(f"{what}: {status.name}")
    return result[1] if len(result) == 2 else result[1:]


@functools.cache
def device_traits(index: int) -> DeviceTraits:
    """Of a CUDA device."""
    properties: Any = torch.cuda.get_device_properties(index)
    return DeviceTraits(
        capability=(properties.major, properties.minor),
        sm_count=properties.multi_processor_count,
        shared_nbytes=properties.shared_memory_per_block_optin,
    )


class LaunchShape(NamedTuple):
    """How a kernel is launched.

    Attributes:
        ctas: thread blocks.
        threads: of each.
        shared: bytes of dynamic shared memory of each.
        cluster: thread blocks of a cluster.
        dependent: whether the kernel may start while its predecessor still runs (it waits where it must).
    """

    ctas: int
    threads: int
    shared: int
    cluster: int = 1
    dependent: bool = False


class _ThreadState(threading.local):
    """Launch parameters are copied by the driver at the launch, so one buffer a thread is enough."""

    def __init__(self) -> None:
        driver = _driver()
        self.arguments = ctypes.create_string_buffer(512)
        self.arguments_address = ctypes.addressof(self.arguments)
        self.pointers = (ctypes.c_void_p * 1)(self.arguments_address)
        self.pointers_address = ctypes.addressof(self.pointers)
        self.configs: dict[LaunchShape, tuple[Any, list[int]]] = {}
        # A thread that has not called the CUDA runtime has no current context.
        if int(_check(driver.cuCtxGetCurrent(), "cuCtxGetCurrent")) == 0:
            device = _check(driver.cuDeviceGet(torch.cuda.current_device()), "cuDeviceGet")
            context = _check(driver.cuDevicePrimaryCtxRetain(device), "cuDevicePrimaryCtxRetain")
            _check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")

    def config(self, shape: LaunchShape, stream: int) -> Any:
        """A launch configuration. Setting a field of one takes about 0.4 us, so each shape keeps its own."""
        found = self.configs.get(shape)
        if found is None:
            found = self.configs[shape] = _launch_config(shape), [-1]
        config, last = found
        if last[0] != stream:
            config.hStream = last[0] = stream
        return config


def _launch_config(shape: LaunchShape) -> Any:
    driver = _driver()
    attributes = []
    if shape.dependent:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    if shape.cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x = shape.cluster
        attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
        attributes.append(attribute)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.blockDimX, config.sharedMemBytes = shape.ctas, shape.threads, shape.shared
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    config.attrs = attributes
    config.numAttrs = len(attributes)
    return config


_thread: _ThreadState | None = None
_lock, _load_lock = threading.Lock(), threading.Lock()


def _thread_state() -> _ThreadState:
    global _thread
    if _thread is None:
        with _lock:
            if _thread is None:
                _thread = _ThreadState()
    return _thread


class Kernel:
    """A loaded kernel; its one parameter is a struct, given as bytes packed by `arguments`."""

    def __init__(self, source: KernelSource, name: str) -> None:
        from cuda.core import ObjectCode

        self._driver = _driver()
        try:
            self._code = ObjectCode.from_cubin(cubin(source), name=name)
            self._kernel = self._code.get_kernel(name)
        except SpinferError:
            raise
        except Exception as error:
            raise LaunchError(
                f"the driver cannot load {name} for {source.arch} ({error}); "
                "kernels compiled by CUDA 13 need driver 580 or newer"
            ) from error
        self._handle = self._driver.CUkernel(int(self._kernel.handle))
        self._shared: dict[int, int] = {}

    def launch(self, index: int, shape: LaunchShape, stream: int, arguments: bytes) -> None:
        """Launch on a stream of device `index`, which must be the current device.

        Args:
            index: of the device.
            shape: of the launch.
            stream: raw handle.
            arguments: the kernel's struct.
        """
        if self._shared.get(index, 0) < shape.shared:
            device = _check(self._driver.cuDeviceGet(index), "cuDeviceGet")
            attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            status = self._driver.cuKernelSetAttribute(attribute, shape.shared, self._handle, device)
            _check(status, "cuKernelSetAttribute")
            self._shared[index] = shape.shared
        state = _thread_state()
        ctypes.memmove(state.arguments_address, arguments, len(arguments))
        config = state.config(shape, stream)
        status = self._driver.cuLaunchKernelEx(config, self._handle, state.pointers_address, 0)[0]
        if status:
            raise LaunchError(f"launching {self._kernel} failed: {status.name}")


def load(source: KernelSource, name: str) -> Kernel:
    """The kernel, compiled and loaded once a process; it runs on every device of its architecture."""
    with _load_lock:  # importing cuda.core from two threads at once fails
        return _loaded(source, name)


@functools.cache
def _loaded(source: KernelSource, name: str) -> Kernel:
    return Kernel(source, name)


class TensorMaps:
    """TMA descriptors of x, kept by address and shape: encoding one takes longer than a launch should."""

    def __init__(self) -> None:
        self._maps: OrderedDict[tuple[int, ...], bytes] = OrderedDict()

    def get(self, address: int, rows: int, columns: int, stride: int, box_rows: int) -> bytes:
        """A (rows, columns) matrix of 16-bit values, `stride` values a row, read in boxes of box_rows x 64."""
        key = (address, rows, columns, stride, box_rows)
        found = self._maps.get(key)
        if found is None:
            driver = _driver()
            encoded = _check(
                driver.cuTensorMapEncodeTiled(
                    driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16,
                    2,
                    address,
                    [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
                    [driver.cuuint64_t(stride * 2)],
                    [driver.cuuint32_t(64), driver.cuuint32_t(box_rows)],
                    [driver.cuuint32_t(1), driver.cuuint32_t(1)],
                    driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                    driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
                    driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
                    driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
                ),
                "cuTensorMapEncodeTiled",
            )
            found = ctypes.string_at(encoded.getPtr(), 128)
            self._maps[key] = found
            while len(self._maps) > _MAX_TENSOR_MAPS:
                self._maps.popitem(last=False)
        return found


class Workspaces:
    """Partial sums and counters, one pair a stream; two kernels on one stream never run at once.

    While a stream is captured, memory must come from the graph's pool and belong to it: a pair made then is used for
    the rest of that capture only, and its zeroing is part of the graph. torch.compile's CUDA graphs do not let anything
    but outputs stay in their pool, while they warm up either: there each call has a pair of its own.
    """

    def __init__(self) -> None:
        self._pairs: OrderedDict[tuple[int, int, bool], tuple[int, Tensor, Tensor]] = OrderedDict()

    def get(self, device: torch.device, stream: int, floats: int, counters: int) -> tuple[Tensor, Tensor]:
        """At least `floats` fp32 and `counters` zeroed int32 numbers."""
        capture = _capture_id(stream) if torch.cuda.is_current_stream_capturing() else 0
        key = (device.index, stream, capture != 0)
        pair = self._pairs.get(key)
        if pair is None or pair[0] != capture or pair[1].numel() < floats or pair[2].numel() < counters:
            partials = torch.empty(max(floats, 1 << 20), dtype=torch.float32, device=device)
            counts = torch.zeros(max(counters, 1 << 12), dtype=torch.int32, device=device)
            pair = (capture, partials, counts)
            if not _belongs_to_compiled_graphs(device, stream):
                self._pairs[key] = pair
                while len(self._pairs) > _MAX_STREAMS:
                    self._pairs.popitem(last=False)
        return pair[1], pair[2]


def _belongs_to_compiled_graphs(device: torch.device, stream: int) -> bool:
    """Whether torch.compile(mode="reduce-overhead") warms up and captures on this stream, from a pool of its own."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    # Each thread has managers of its own. One without any fails when asked for them (torch 2.11).
    if trees is None or not torch._C._is_key_in_tls("tree_manager_containers"):
        return False
    manager = trees.get_manager(device.index, create_if_none_exists=False)
    return manager is not None and manager.stream.cuda_stream == stream


def _capture_id(stream: int) -> int:
    driver = _driver()
    status = driver.cuStreamGetCaptureInfo(driver.CUstream(stream))
    return int(_check(status, "cuStreamGetCaptureInfo")[1])
