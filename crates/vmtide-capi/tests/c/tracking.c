/* Change tracking of an image that this program hosts: what is written is told, since each moment. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vmtide.h>

static void must(vmtide_status status, const vmtide_error *error, const char *what) {
    if (status == VMTIDE_OK)
        return;
    fprintf(stderr, "%s: %s (status %d)\n", what, vmtide_error_message(*error), (int)status);
    exit(1);
}

/* Whether the changes since `id` are just the block of 64 KiB at `offset`. */
static int is_only(const char *path, vmtide_text id, uint64_t offset) {
    vmtide_ranges changes;
    vmtide_error error;
    const vmtide_range *range;
    int right;
    must(vmtide_tracking_changes(path, NULL, vmtide_text_data(id), &changes, &error), &error, "changes");
    range = vmtide_ranges_data(changes);
    right = vmtide_ranges_count(changes) == 1 && range[0].offset == offset && range[0].length == 64 << 10;
    vmtide_close(changes, NULL);
    return right && vmtide_ranges_count(changes) == 0;
}

int main(int argc, char **argv) {
    char path[4096], block[4096];
    vmtide_open_options tracked = {.struct_size = sizeof tracked, .flags = VMTIDE_OPEN_WRITABLE | VMTIDE_OPEN_TRACK};
    vmtide_image image;
    vmtide_text first, second, state;
    vmtide_ranges none;
    vmtide_error error;
    if (argc != 2)
        return 2;
    snprintf(path, sizeof path, "%s/tracked.vhdx", argv[1]);
    memset(block, 7, sizeof block);
    must(vmtide_image_create(path, 16 << 20, NULL, &error), &error, "create");
    must(vmtide_tracking_enable(path, NULL, 1, &error), &error, "enable");
    must(vmtide_tracking_checkpoint(path, &first, &error), &error, "first checkpoint");

    must(vmtide_image_open(path, &tracked, &image, &error), &error, "open");
    must(vmtide_image_write(image, 1 << 20, block, sizeof block, &error), &error, "write");
    must(vmtide_image_flush(image, &error), &error, "flush");
    must(vmtide_close(image, &error), &error, "close");
    if (!is_only(path, first, 1 << 20))
        return 1;
    must(vmtide_tracking_checkpoint(path, &second, &error), &error, "second checkpoint");

    must(vmtide_image_open(path, &tracked, &image, &error), &error, "open again");
    must(vmtide_image_write(image, 9 << 20, block, sizeof block, &error), &error, "write again");
    must(vmtide_close(image, &error), &error, "close again");
    if (!is_only(path, second, 9 << 20))
        return 1;
    must(vmtide_tracking_state(path, NULL, &state, &error), &error, "state");
    if (!strstr(vmtide_text_data(state), "\"enabled\":true") || !strstr(vmtide_text_data(state), vmtide_text_data(second)))
        return 1;
    /* What is not surely known is an error. */
    if (vmtide_tracking_changes(path, NULL, "rct:none", &none, NULL) == VMTIDE_OK || none != 0)
        return 1;
    if (vmtide_agent_open_disk(path, NULL, &image, NULL) != VMTIDE_INVALID)
        return 1;
    vmtide_close(state, NULL);
    vmtide_close(first, NULL);
    vmtide_close(second, NULL);
    puts("tracked");
    return vmtide_open_handles() != 0;
}
