"""Table of every native thread pool that a worker can meet, one row each, without code.

A row has the variables that bound a pool, in their order of precedence; the marks by which the
loaded pool is recognised; the call that caps the loaded pool; and its hole, the part that no
variable and no call bounds. The code that uses the table is in ``environment`` (variables),
``calls`` (run time) and ``pools`` (loaded pools).

Excluded on purpose, because setting them does harm:
    * ``OMP_THREAD_LIMIT``: an OpenBLAS built on OpenMP spins for ever as soon as
      ``omp_get_max_threads()`` is above it. It is the only variable that also bounds an explicit
      ``num_threads(4)``, so the table has it for users who set it (``opt_in``).
    * ``POLARS_MAX_BLOCKING_THREAD_COUNT=1``: Polars' ``scan_csv`` never returns.
    * ``XLA_FLAGS``: its thread flags have no effect any more, and setting it would replace the
      user's value.
    * ``SLURM_CPUS_ON_NODE``: DuckDB reads it, but schedulers' own tools read it as the size of the
      machine (``opt_in``).

Not covered:
    * GPUs, and the threads that a task starts itself.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadVariable:
    """An environment variable that bounds a native thread pool.

    Attributes:
        name: The variable.
        off: The text that switches the pool off. A variable with this text is a switch: it is set
            when the cap is one thread, and left alone otherwise. ``None`` is a usual variable,
            whose text is the number of threads.
    """

    name: str
    off: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeRuntime:
    """A kind of native thread pool.

    Attributes:
        name: Name in lower case; threadpoolctl's ``internal_api`` if threadpoolctl knows the pool.
        used_by: Libraries that bring the pool into a process.
        variables: Variables to set in a worker's environment, in order of precedence.
        falls_back_to: Variables of other rows that the pool reads if its own are not set, in order
            of precedence.
        removed: Variables to remove from a worker's environment: they would override the cap.
        removed_win: Whether these override the pool's own variables; otherwise they come between
            those and ``falls_back_to``.
        opt_in: Further variables that bound the pool, and that only the user sets (the module says
            why).
        libraries: Beginnings of the file names of the pool's shared libraries, in lower case.
        modules: Full names of the Python modules that bring the pool.
        thread_names: Names of the pool's threads, as a regular expression, if they have names.
        call: Call that caps the loaded pool; ``None`` if nothing does.
        through: The row whose pool it uses, if it has no pool.
        counts_workers: Whether its variables limit the number of parallel workers of a program,
            instead of threads.
        fixed: Part that cannot be changed after loading; empty if all can.
        hole: Part that neither variable nor call reaches, and the remedy; empty if none.
        source: Documentation of the runtime.
    """

    name: str
    used_by: str
    variables: tuple[ThreadVariable, ...] = ()
    falls_back_to: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    removed_win: bool = False
    opt_in: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    thread_names: str = ""
    call: str | None = None
    through: str | None = None
    counts_workers: bool = False
    fixed: str = ""
    hole: str = ""
    source: str


def _numbers(*names: str) -> tuple[ThreadVariable, ...]:
    return tuple(ThreadVariable(name=name) for name in names)


# The remedy for a hole that no setting of the runtime closes.
_AFFINITY = "ProcessPool(pin_workers=True) bounds it"

RUNTIMES: tuple[NativeRuntime, ...] = (
    # BLAS, as threadpoolctl knows it.
    NativeRuntime(
        name="openblas",
        used_by="the wheels of NumPy and SciPy (a private copy each), conda, distributions",
        variables=_numbers("OPENBLAS_NUM_THREADS"),
        falls_back_to=("OMP_NUM_THREADS",),
        # Below OPENBLAS_NUM_THREADS and above OMP_NUM_THREADS, which alone counts in a build
        # on OpenMP; empty, zero, negative and other text is passed over.
        removed=("GOTO_NUM_THREADS", "OPENBLAS_DEFAULT_NUM_THREADS"),
        libraries=("libopenblas", "libscipy_openblas", "openblas", "libblas"),
        call="threadpoolctl",
        fixed="the threads it has started: they are idle beyond the cap, and a forked process "
        "that inherits it starts them again",
        hole="a build on OpenMP holds the run-time cap in the calling thread only; "
        "OMP_NUM_THREADS, set at birth, bounds its other threads",
        source="OpenBLAS README.md, 'Setting the number of threads using environment variables'",
    ),
    NativeRuntime(
        name="mkl",
        used_by="conda's NumPy and SciPy, Intel's wheels",
        variables=_numbers("MKL_NUM_THREADS"),
        falls_back_to=("OMP_NUM_THREADS",),
        removed=("MKL_DOMAIN_NUM_THREADS",),
        removed_win=True,
        libraries=("libmkl_rt", "mkl_rt"),
        call="threadpoolctl",
        hole="its TBB layer reads no variable and is capped in the worker's own thread only: "
        "set MKL_THREADING_LAYER=SEQUENTIAL for tasks that start threads",
        source="oneMKL Developer Guide, 'Techniques to Set the Number of Threads'; "
        "'MKL_DOMAIN_NUM_THREADS'",
    ),
    NativeRuntime(
        name="blis",
        used_by="NumPy and SciPy on BLIS, AMD's AOCL",
        variables=_numbers("BLIS_NUM_THREADS"),
        falls_back_to=("OMP_NUM_THREADS",),
        removed=("BLIS_JC_NT", "BLIS_PC_NT", "BLIS_IC_NT", "BLIS_JR_NT", "BLIS_IR_NT"),
        removed_win=True,
        libraries=("libblis", "blis"),
        call="threadpoolctl",
        source="BLIS docs/Multithreading.md, 'Globally via environment variables'",
    ),
    NativeRuntime(
        name="flexiblas",
        used_by="Fedora's NumPy and SciPy; it loads one of the libraries above",
        falls_back_to=("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"),
        libraries=("libflexiblas",),
        call="threadpoolctl",
        hole="its variable is the one of the library that it has loaded",
        source="FlexiBLAS README.md, 'Usage'",
    ),
    NativeRuntime(
        name="accelerate",
        used_by="NumPy and SciPy on macOS",
        variables=_numbers("VECLIB_MAXIMUM_THREADS"),
        fixed="the number of threads is read once",
        hole="its threads are Grand Central Dispatch's: nothing lowers them after the load",
        source="macOS, man 7 Accelerate",
    ),
    # OpenMP, and those whose threads are OpenMP's.
    NativeRuntime(
        name="openmp",
        used_by="libgomp, libomp, libiomp, vcomp: scikit-learn, PyTorch, LightGBM, XGBoost, FAISS",
        variables=_numbers("OMP_NUM_THREADS"),
        opt_in=("OMP_THREAD_LIMIT",),
        libraries=("libgomp", "libomp", "libiomp", "vcomp"),
        call="threadpoolctl",
        fixed="the number that threads begin with which a task starts: the run-time cap is "
        "one of the calling thread",
        hole="an explicit num_threads(4), n_jobs=4 or the like is obeyed: pass 1, or set "
        "OMP_THREAD_LIMIT where no OpenBLAS is built on OpenMP",
        source="OpenMP 5.2, section 2.4 (nthreads-var), section 21.1.2 (OMP_NUM_THREADS)",
    ),
    NativeRuntime(
        name="lightgbm",
        used_by="lightgbm",
        falls_back_to=("OMP_NUM_THREADS",),
        modules=("lightgbm",),
        through="openmp",
        hole="num_threads in its parameters is obeyed: pass 1 or nothing",
        source="LightGBM docs/Parameters.rst, num_threads",
    ),
    NativeRuntime(
        name="xgboost",
        used_by="xgboost",
        falls_back_to=("OMP_NUM_THREADS",),
        modules=("xgboost",),
        call="xgboost.set_config(nthread=)",
        through="openmp",
        hole="nthread of train() does not hold for DMatrix: pass it to both, or to neither",
        source="XGBoost doc/parameter.rst, 'Global Configuration', nthread",
    ),
    NativeRuntime(
        name="faiss",
        used_by="faiss",
        falls_back_to=("OMP_NUM_THREADS",),
        modules=("faiss",),
        through="openmp",
        source="FAISS wiki, 'Threads and asynchronous calls'",
    ),
    NativeRuntime(
        name="torch",
        used_by="PyTorch's operations (intra-op)",
        falls_back_to=("MKL_NUM_THREADS", "OMP_NUM_THREADS"),
        modules=("torch",),
        call="torch.set_num_threads()",
        source="PyTorch docs/source/notes/cpu_threading_torchscript_inference.rst",
    ),
    NativeRuntime(
        name="torch-interop",
        used_by="PyTorch's torch.jit.fork; every thread of it has an OpenMP team of its own",
        modules=("torch",),
        call="torch.set_num_interop_threads()",
        fixed="the number, once it was set or the pool was used",
        source="PyTorch docs/source/notes/cpu_threading_torchscript_inference.rst",
    ),
    # Separate pools.
    NativeRuntime(
        name="tbb",
        used_by="oneTBB: MKL's and Numba's TBB layers, scikit-learn-intelex",
        libraries=("libtbb.", "libtbb12", "tbb12"),
        hole="no variable and no call of its own: idle threads stay, those that work are "
        f"bounded by the library above it; {_AFFINITY}",
        source="oneTBB, tbb::global_control::max_allowed_parallelism",
    ),
    NativeRuntime(
        name="numba",
        used_by="Numba's parallel=True and prange, on OpenMP, TBB or its own workqueue",
        variables=_numbers("NUMBA_NUM_THREADS"),
        modules=("numba",),
        call="numba.set_num_threads()",
        fixed="the number of threads launched; numba.set_num_threads() masks, below that number",
        hole="on TBB the threads are launched and idle; on OpenMP a fork of a process that "
        "has launched them is killed by libgomp, capped or not",
        source="Numba docs/source/user/threading-layer.rst, 'Setting the Number of Threads'",
    ),
    NativeRuntime(
        name="numexpr",
        used_by="NumExpr; pandas imports it when it is installed",
        # The ceiling as well: importing blosc2 calls numexpr.set_num_threads(all CPUs),
        # which beats NUMEXPR_NUM_THREADS.
        variables=_numbers("NUMEXPR_NUM_THREADS", "NUMEXPR_MAX_THREADS"),
        falls_back_to=("OMP_NUM_THREADS",),
        modules=("numexpr",),
        call="numexpr.set_num_threads()",
        fixed="NUMEXPR_MAX_THREADS, the ceiling of numexpr.set_num_threads()",
        source="NumExpr docs/user_guide.rst, 'Threadpool Configuration'",
    ),
    NativeRuntime(
        name="polars",
        used_by="Polars",
        variables=_numbers("POLARS_MAX_THREADS", "POLARS_ASYNC_THREAD_COUNT"),
        modules=("polars",),
        thread_names=r"polars-[0-9]+",
        fixed="everything: the size of its pool is read when polars is imported, so a forked "
        "worker has its program's",
        hole="background threads (jemalloc's, its own cleaner's, those of readers) stay, idle",
        source="Polars, polars.thread_pool_size()",
    ),
    NativeRuntime(
        name="rayon",
        used_by="libraries written in Rust, such as tokenizers",
        variables=_numbers("RAYON_NUM_THREADS"),
        fixed="everything: the global pool is made with its first use",
        source="rayon, ThreadPoolBuilder::num_threads",
    ),
    NativeRuntime(
        name="tokenizers",
        used_by="Hugging Face tokenizers, on Rayon",
        variables=(ThreadVariable(name="TOKENIZERS_PARALLELISM", off="false"),),
        falls_back_to=("RAYON_NUM_THREADS",),
        modules=("tokenizers",),
        through="rayon",
        fixed="the size of Rayon's pool; whether it is used is asked each time",
        source="tokenizers, tokenizers/src/utils/parallelism.rs",
    ),
    NativeRuntime(
        name="tokio",
        used_by="libraries written in Rust with asynchronous input: DataFusion, delta-rs",
        variables=_numbers("TOKIO_WORKER_THREADS"),
        thread_names=r"tokio-rt-worker",
        fixed="everything: a runtime is made with its first use",
        hole="blocking threads (512 at most) are started as they are needed",
        source="tokio, runtime::Builder::worker_threads",
    ),
    NativeRuntime(
        name="arrow",
        used_by="PyArrow's computing, and pandas on it",
        falls_back_to=("OMP_NUM_THREADS", "OMP_THREAD_LIMIT"),
        modules=("pyarrow",),
        call="pyarrow.set_cpu_count()",
        hole="jemalloc's background thread stays, idle",
        source="Arrow docs/source/cpp/threading.rst; cpp/env_vars.rst",
    ),
    NativeRuntime(
        name="arrow-io",
        used_by="PyArrow's reading and writing (8 threads)",
        variables=_numbers("ARROW_IO_THREADS"),
        modules=("pyarrow",),
        call="pyarrow.set_io_thread_count()",
        source="Arrow docs/source/cpp/env_vars.rst, ARROW_IO_THREADS",
    ),
    NativeRuntime(
        name="opencv",
        used_by="OpenCV (cv2)",
        variables=_numbers("OPENCV_FOR_THREADS_NUM"),
        modules=("cv2",),
        call="cv2.setNumThreads()",
        fixed="a lower number above 1, which stops threads and hangs in a forked process: "
        "it is lowered to none at all",
        source="OpenCV, 'OpenCV environment variables reference'; cv::setNumThreads",
    ),
    NativeRuntime(
        name="duckdb",
        used_by="DuckDB: one pool per database",
        opt_in=("SLURM_CPUS_ON_NODE",),
        modules=("duckdb",),
        call="duckdb.connect(config=)",
        fixed="databases that are open already",
        hole="the default database of duckdb.sql() and its like: run "
        'duckdb.execute("SET threads = 1"), or set SLURM_CPUS_ON_NODE for workers',
        source="DuckDB, 'Configuration', threads; src/main/config.cpp, GetSystemMaxThreads",
    ),
    NativeRuntime(
        name="onnxruntime",
        used_by="ONNX Runtime: one pool per session",
        variables=_numbers("ORT_INTRA_OP_NUM_THREADS"),
        modules=("onnxruntime",),
        fixed="a session keeps its threads",
        hole="releases that do not read the variable: set "
        "SessionOptions.intra_op_num_threads = 1 for each session",
        source="ONNX Runtime docs/performance/tune-performance/threading.md",
    ),
    NativeRuntime(
        name="tensorflow",
        used_by="TensorFlow's operations",
        variables=_numbers("TF_NUM_INTRAOP_THREADS"),
        modules=("tensorflow",),
        fixed="everything, once the context is initialized",
        source="TensorFlow, tf.config.threading.set_intra_op_parallelism_threads",
    ),
    NativeRuntime(
        name="tensorflow-interop",
        used_by="TensorFlow's graphs",
        variables=_numbers("TF_NUM_INTEROP_THREADS"),
        modules=("tensorflow",),
        fixed="everything, once the context is initialized",
        source="TensorFlow, tf.config.threading.set_inter_op_parallelism_threads",
    ),
    NativeRuntime(
        name="xla",
        used_by="JAX on the CPU",
        variables=_numbers("PJRT_NPROC"),
        modules=("jax", "jaxlib"),
        thread_names=r"tf_XLAEigen",
        fixed="everything: the client is made with the first operation",
        hole=f"the pool that compiles, idle afterwards; {_AFFINITY}",
        source="XLA, xla/pjrt/utils.cc, DefaultThreadPoolSize",
    ),
    NativeRuntime(
        name="blosc",
        used_by="C-Blosc and C-Blosc2: blosc, blosc2, PyTables, h5py plugins",
        variables=_numbers("BLOSC_NTHREADS"),
        modules=("blosc",),
        call="blosc.set_nthreads()",
        source="C-Blosc README.md; blosc.h, BLOSC_NTHREADS",
    ),
    NativeRuntime(
        name="blosc2",
        used_by="Python-Blosc2",
        falls_back_to=("BLOSC_NTHREADS", "NUMEXPR_NUM_THREADS"),
        modules=("blosc2",),
        call="blosc2.set_nthreads()",
        source="Python-Blosc2, blosc2.set_nthreads",
    ),
    NativeRuntime(
        name="numcodecs",
        used_by="numcodecs.blosc, and Zarr on it (8 threads)",
        falls_back_to=("BLOSC_NTHREADS",),
        modules=("numcodecs.blosc",),
        call="numcodecs.blosc.set_nthreads()",
        source="Numcodecs docs/compression/blosc.rst, set_nthreads",
    ),
    NativeRuntime(
        name="itk",
        used_by="ITK and SimpleITK",
        variables=_numbers("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"),
        removed=("ITK_NUMBER_OF_THREADS_ENV_LIST",),
        removed_win=True,
        modules=("SimpleITK",),
        call="SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads()",
        hole="filters that exist already keep their number: SetNumberOfWorkUnits(1)",
        source="ITK, itkMultiThreaderBase.cxx, GetGlobalDefaultNumberOfThreads",
    ),
    NativeRuntime(
        name="libvips",
        used_by="libvips: pyvips",
        variables=_numbers("VIPS_CONCURRENCY"),
        modules=("pyvips",),
        fixed="the variable is read when the library is initialized",
        source="libvips, vips_concurrency_set",
    ),
    NativeRuntime(
        name="catboost",
        used_by="CatBoost: one pool per model",
        modules=("catboost",),
        hole="no variable: pass thread_count=1 to each Pool, to each model and to predict(); "
        f"{_AFFINITY}",
        source="CatBoost, 'Performance settings', thread_count",
    ),
    NativeRuntime(
        name="scipy.fft",
        used_by="scipy.fft with workers=",
        modules=("scipy.fft",),
        hole="one thread unless asked for more, then obeyed: pass no workers=",
        source="SciPy, scipy.fft.set_workers",
    ),
    NativeRuntime(
        name="tensorstore",
        used_by="TensorStore: one pool per context",
        modules=("tensorstore",),
        hole="no variable: pass Context({'data_copy_concurrency': {'limit': 1}, "
        "'file_io_concurrency': {'limit': 1}})",
        source="TensorStore, Context.data_copy_concurrency",
    ),
    NativeRuntime(
        name="ffmpeg",
        used_by="FFmpeg: PyAV, one pool per codec",
        modules=("av",),
        hole=f"no variable: set codec_context.thread_count = 1 for each stream; {_AFFINITY}",
        source="FFmpeg, AVCodecContext.thread_count",
    ),
    NativeRuntime(
        name="grpc",
        used_by="gRPC",
        modules=("grpc",),
        hole=f"no variable: its threads wait for the network and hardly compute; {_AFFINITY}",
        source="gRPC, src/core/lib/event_engine/posix_engine",
    ),
    # Pools that Python code sizes by a variable.
    NativeRuntime(
        name="dask",
        used_by="Dask's threaded scheduler",
        variables=_numbers("DASK_NUM_WORKERS"),
        modules=("dask",),
        fixed="dask.config has read the variable when dask was imported",
        source="Dask docs/source/configuration.rst, num_workers",
    ),
    NativeRuntime(
        name="zarr",
        used_by="Zarr 3",
        variables=_numbers("ZARR_THREADING__MAX_WORKERS"),
        modules=("zarr",),
        fixed="zarr.config has read the variable when zarr was imported",
        source="Zarr docs/user-guide/config, threading.max_workers",
    ),
    NativeRuntime(
        name="loky",
        used_by="joblib, loky and scikit-learn's n_jobs=-1: the worker's share of the CPUs",
        variables=_numbers("LOKY_MAX_CPU_COUNT"),
        counts_workers=True,
        source="loky, loky.cpu_count",
    ),
    NativeRuntime(
        name="python",
        used_by="os.process_cpu_count() from Python 3.13 on: the worker's share of the CPUs",
        variables=_numbers("PYTHON_CPU_COUNT"),
        counts_workers=True,
        fixed="everything: the interpreter reads it when it starts",
        source="Python, Doc/using/cmdline.rst, PYTHON_CPU_COUNT",
    ),
)
