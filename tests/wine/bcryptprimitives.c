/* The part of bcryptprimitives.dll that Rust's standard library takes random numbers from, for tests under
 * Wine before 9, which has no such library. */
#include <windows.h>
#include <ntsecapi.h>

/* RtlGenRandom counts in 32 bits. */
#define AT_ONCE (1UL << 20)

__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE data, SIZE_T size)
{
    while (size > 0) {
        ULONG part = size < AT_ONCE ? (ULONG)size : AT_ONCE;
        if (!RtlGenRandom(data, part))
            return FALSE;
        data += part;
        size -= part;
    }
    return TRUE;
}
