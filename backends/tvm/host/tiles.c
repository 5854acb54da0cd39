#include <cpuid.h>
#include <sys/syscall.h>
/* Whether the processor has tiles for products of bytes (AMX), and Linux lets this process use them. */
static int tiles_allowed(void) {
#if defined(__linux__)
  unsigned a, b, c, d;
  const int arch_request_permission = 0x1023, tile_data = 18;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 3) == 3 &&
         syscall(SYS_arch_prctl, arch_request_permission, tile_data) == 0;
#else
  return 0;
#endif
}
