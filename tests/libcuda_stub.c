/* A CUDA driver that has no device, for reads into host memory on a machine that has no driver.

   kvikio looks these names up when it first reads, and asks whether a buffer is the device's. All but one answer
   CUDA_ERROR_NOT_INITIALIZED, from which kvikio concludes that every buffer is the host's. The version must be told: where that
   fails kvikio waits for itself forever. */

enum { NOT_INITIALIZED = 3, VERSION = 12080 };

int cuDriverGetVersion(int *version)
{
    *version = VERSION;
    return 0;
}

static int describe(const char **text)
{
    *text = "no device: a stub driver";
    return 0;
}

int cuGetErrorName(int error, const char **text) { return (void)error, describe(text); }
int cuGetErrorString(int error, const char **text) { return (void)error, describe(text); }

#define NO_DEVICE(name) int name(void) { return NOT_INITIALIZED; }

NO_DEVICE(cuInit)
NO_DEVICE(cuDeviceGet)
NO_DEVICE(cuDeviceGetCount)
NO_DEVICE(cuDeviceGetAttribute)
NO_DEVICE(cuDevicePrimaryCtxRetain)
NO_DEVICE(cuDevicePrimaryCtxRelease_v2)

NO_DEVICE(cuCtxCreate_v2)
NO_DEVICE(cuCtxCreate_v3)
NO_DEVICE(cuCtxCreate_v4)
NO_DEVICE(cuCtxDestroy_v2)
NO_DEVICE(cuCtxPushCurrent_v2)
NO_DEVICE(cuCtxPopCurrent_v2)
NO_DEVICE(cuCtxGetCurrent)
NO_DEVICE(cuCtxGetDevice)

NO_DEVICE(cuPointerGetAttribute)
NO_DEVICE(cuPointerGetAttributes)
NO_DEVICE(cuMemGetAddressRange_v2)
NO_DEVICE(cuMemHostAlloc)
NO_DEVICE(cuMemFreeHost)
NO_DEVICE(cuMemHostRegister_v2)
NO_DEVICE(cuMemHostUnregister)

NO_DEVICE(cuMemcpyAsync)
NO_DEVICE(cuMemcpyHtoDAsync_v2)
NO_DEVICE(cuMemcpyDtoHAsync_v2)
NO_DEVICE(cuMemcpyBatchAsync)
NO_DEVICE(cuMemcpyBatchAsync_v2)

NO_DEVICE(cuStreamCreate)
NO_DEVICE(cuStreamDestroy_v2)
NO_DEVICE(cuStreamSynchronize)
NO_DEVICE(cuEventCreate)
NO_DEVICE(cuEventDestroy_v2)
NO_DEVICE(cuEventRecord)
NO_DEVICE(cuEventQuery)
NO_DEVICE(cuEventSynchronize)
NO_DEVICE(cuLaunchHostFunc)
