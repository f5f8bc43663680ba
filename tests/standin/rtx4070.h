/* What the stand-in's card is, an RTX 4070, and the calls that have one answer.

   Sources: cuda.h, and the deviceQuery of such a card. */

static const int ATTRIBUTES[CU_DEVICE_ATTRIBUTE_MAX] = {
    [CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK] = 1024,
    [CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X] = 1024,
    [CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y] = 1024,
    [CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z] = 64,
    [CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X] = 2147483647,
    [CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y] = 65535,
    [CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z] = 65535,
    [CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK] = 49152,
    [CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY] = 65536,
    [CU_DEVICE_ATTRIBUTE_WARP_SIZE] = 32,
    [CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK] = 65536,
    [CU_DEVICE_ATTRIBUTE_CLOCK_RATE] = 2475000,
    [CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT] = 46,
    [CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE] = 10501000,
    [CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH] = 192,
    [CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE] = 37748736,
    [CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR] = 1536,
    [CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING] = 1,
    [CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR] = 8,
    [CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR] = 9,
    [CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR] = 102400,
    [CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR] = 65536,
    [CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH] = 1,
    [CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN] = 101376,
    [CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR] = 24,
    [CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK] = 1024,
};

static const struct cudaDeviceProp PROPERTIES = {
    /* name and UUID as in fake_nvml.c */
    .name = "NVIDIA GeForce RTX 4070",
    .uuid = {"\x12\x34\x56\x78\x12\x34\x12\x34\x12\x34\x12\x34\x56\x78\x9a\xbc"},
    .sharedMemPerBlock = 49152,
    .sharedMemPerBlockOptin = 101376,
    .sharedMemPerMultiprocessor = 102400,
    .regsPerBlock = 65536,
    .regsPerMultiprocessor = 65536,
    .warpSize = 32,
    .maxThreadsPerBlock = 1024,
    .maxThreadsPerMultiProcessor = 1536,
    .maxBlocksPerMultiProcessor = 24,
    .maxThreadsDim = {1024, 1024, 64},
    .maxGridSize = {2147483647, 65535, 65535},
    .major = 8,
    .minor = 9,
    .multiProcessorCount = 46,
    .l2CacheSize = 37748736,
    .memoryBusWidth = 192,
    .textureAlignment = 512,
    .pciBusID = 1,
    .concurrentKernels = 1,
    .unifiedAddressing = 1,
};

#define RUNTIME(name, parameters, answer) \
    cudaError_t name parameters { return answer, cudaSuccess; }
#define DRIVER(name, parameters, answer) \
    CUresult name parameters { return answer, CUDA_SUCCESS; }
#define BLAS(name, parameters, answer) \
    int name parameters { return answer, 0; }

RUNTIME(cudaGetDevice, (int *device), *device = 0)
RUNTIME(cudaDriverGetVersion, (int *version),
        (configure(), *version = driver_version))
RUNTIME(cudaRuntimeGetVersion, (int *version), *version = 13000)
RUNTIME(cudaDeviceGetAttribute, (int *value, enum cudaDeviceAttr attribute, int device),
        *value = ATTRIBUTES[attribute])
RUNTIME(cudaStreamIsCapturing, (cudaStream_t stream, enum cudaStreamCaptureStatus *status),
        *status = cudaStreamCaptureStatusNone)
RUNTIME(cudaStreamGetPriority, (cudaStream_t stream, int *priority), *priority = 0)
RUNTIME(cudaEventDestroy, (cudaEvent_t event), free(event))
RUNTIME(__cudaGetKernel, (cudaKernel_t *kernel, const void *host), *kernel = (cudaKernel_t)host)
RUNTIME(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, (int *blocks, const void *host,
         int size, size_t shared, unsigned flags), *blocks = 2)
RUNTIME(cudaOccupancyMaxActiveBlocksPerMultiprocessor, (int *blocks, const void *host, int size,
         size_t shared), *blocks = 2)
DRIVER(cuDriverGetVersion, (int *version), cudaDriverGetVersion(version))
DRIVER(cuDeviceGetCount, (int *count), cudaGetDeviceCount(count))
DRIVER(cuDeviceGet, (CUdevice *device, int i), *device = i)
DRIVER(cuCtxGetDevice, (CUdevice *device), *device = 0)
DRIVER(cuDeviceGetAttribute, (int *value, CUdevice_attribute attribute, CUdevice device),
        *value = ATTRIBUTES[attribute])
DRIVER(cuDevicePrimaryCtxRetain, (CUcontext *context, CUdevice device), *context = (CUcontext)1)
DRIVER(cuCtxGetCurrent, (CUcontext *context), *context = (CUcontext)1)
DRIVER(cuGetErrorString, (CUresult e, const char **text),
        *text = cudaGetErrorString((cudaError_t)e))
DRIVER(cuModuleGetFunction, (CUfunction *function, CUmodule module, const char *name),
        *function = (CUfunction)strdup(name))
DRIVER(cuFuncGetAttribute, (int *value, CUfunction_attribute attribute, CUfunction function),
         *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64
            : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0)
DRIVER(cuOccupancyMaxActiveClusters, (int *count, CUfunction function, const CUlaunchConfig *c),
        *count = 1)
BLAS(cublasCreate_v2, (void **handle), *handle = malloc(16))
BLAS(cublasDestroy_v2, (void *handle), free(handle))
BLAS(cublasGetMathMode, (void *handle, int *mode), *mode = 0)
BLAS(cublasGetPointerMode_v2, (void *handle, int *mode), *mode = 0)
BLAS(cublasLtMatrixLayoutDestroy, (void *layout), free(layout))
BLAS(cublasLtMatmulDescDestroy, (void *description), free(description))
BLAS(cublasLtMatmulPreferenceCreate, (void **preference), *preference = malloc(64))
BLAS(cublasLtMatmulPreferenceDestroy, (void *preference), free(preference))
RUNTIME(cudaMemGetInfo, (size_t *free_bytes, size_t *total),
        (configure(), *total = total_bytes,
         *free_bytes = total_bytes - used_bytes - others_bytes))
RUNTIME(cudaDeviceGetStreamPriorityRange, (int *least, int *greatest), (*least = 0, *greatest = -5))
RUNTIME(cudaStreamGetCaptureInfo,
        (cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
         cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
         size_t *count),
        *status = cudaStreamCaptureStatusNone)
RUNTIME(cudaGetDeviceProperties, (struct cudaDeviceProp *p, int device),
        (configure(), *p = PROPERTIES, p->totalGlobalMem = total_bytes))
RUNTIME(cudaFuncGetAttributes, (struct cudaFuncAttributes *a, const void *host),
        *a = ((struct cudaFuncAttributes){.numRegs = 64, .maxThreadsPerBlock = 1024,
                                          .binaryVersion = 89, .ptxVersion = 80,
                                          .maxDynamicSharedSizeBytes = 49152}))
DRIVER(cuDevicePrimaryCtxGetState, (CUdevice device, unsigned *flags, int *active),
       (*flags = 0, *active = 1))
/* Called when torch is loaded: none of them may ask for the environment. */
void __cudaRegisterVar(void **module) {}
void __cudaRegisterFatBinaryEnd(void **module) {}
char __cudaInitModule(void **module) { return 1; }
void **__cudaRegisterFatBinary(void *binary) { return malloc(8); }
