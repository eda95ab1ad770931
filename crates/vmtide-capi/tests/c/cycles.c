/* Opens, reads and closes an image N times; the memory after the last must be that after the first tenth. Of fewer than
 * 1000 times only leaks are looked for, by valgrind. */
#include <stdio.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif
#include <vmtide.h>

static long resident_kib(void) {
    long pages = 0, resident = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file || fscanf(file, "%ld %ld", &pages, &resident) != 2)
        exit(2);
    fclose(file);
    return resident * 4;
}

int main(int argc, char **argv) {
    char path[4096], block[4096];
    long before = 0, after, count = argc == 3 ? atol(argv[2]) : 0, at;
    if (count < 1)
        return 2;
#ifdef __linux__
    /* The kernel would make 2 MiB of a few pages. */
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
#endif
    snprintf(path, sizeof path, "%s/cycles.qcow2", argv[1]);
    if (vmtide_image_create(path, 1 << 20, NULL, NULL) != VMTIDE_OK)
        return 1;
    for (at = 0; at < count; at++) {
        vmtide_image image;
        vmtide_text info;
        vmtide_error error;
        if (vmtide_image_open(path, NULL, &image, NULL) != VMTIDE_OK ||
            vmtide_image_read(image, 4096, block, sizeof block, NULL) != VMTIDE_OK ||
            vmtide_image_read(image, 1 << 20, block, 1, &error) != VMTIDE_INVALID ||
            vmtide_image_info(path, NULL, &info, NULL) != VMTIDE_OK || vmtide_close(error, NULL) != VMTIDE_OK ||
            vmtide_close(info, NULL) != VMTIDE_OK || vmtide_close(image, NULL) != VMTIDE_OK)
            return 1;
        if (at == count / 10)
            before = resident_kib();
    }
    after = resident_kib();
    printf("%ld cycles: %ld KiB, then %ld KiB\n", count, before, after);
    return vmtide_open_handles() != 0 || (count >= 1000 && after > before + 512);
}
