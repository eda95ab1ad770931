/* Backs up a disk image by its changed ranges and reads the restore point at random, with libvmtide.
 *
 *   cc backup.c $(pkg-config --cflags --libs vmtide) -o backup
 *   ./backup DIRECTORY        makes an image and a repository below DIRECTORY
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vmtide.h>

#define MIB (1024u * 1024u)

/* Ends the program with what failed. */
static void must(vmtide_status status, const vmtide_error *error, const char *what) {
    if (status == VMTIDE_OK)
        return;
    fprintf(stderr, "%s: %s (status %d)\n", what, vmtide_error_message(*error), (int)status);
    vmtide_close(*error, NULL);
    exit(1);
}

static int32_t show_progress(void *context, uint64_t done, uint64_t total, uint64_t moved) {
    (void)moved;
    *(uint64_t *)context = total ? done * 100 / total : 0;
    return 0; /* anything else cancels */
}

static void backup(vmtide_repository repository, const char *image, const vmtide_range *changes, uint64_t count) {
    uint64_t percent = 0;
    vmtide_backup_options options = {.struct_size = sizeof options, .name = "web"};
    vmtide_watch watch = {.struct_size = sizeof watch, .context = &percent, .progress = show_progress};
    vmtide_text summary;
    vmtide_error error;
    options.changes = changes;
    options.changes_count = count;
    options.flags = changes ? VMTIDE_BACKUP_CHANGES : 0;
    must(vmtide_backup(repository, image, &options, &watch, &summary, &error), &error, "back up");
    printf("%s\n", vmtide_text_data(summary));
    vmtide_close(summary, NULL);
    if (percent > 100)
        exit(1);
}

int main(int argc, char **argv) {
    char image_path[4096], repository_path[4096], *block = malloc(MIB), *back = malloc(MIB);
    vmtide_image image, disk;
    vmtide_repository repository;
    vmtide_error error;
    vmtide_open_options writable = {.struct_size = sizeof writable, .flags = VMTIDE_OPEN_WRITABLE};
    vmtide_range changed = {.offset = 5 * MIB, .length = MIB};
    uint64_t size, at;

    if (argc != 2 || !block || !back || vmtide_abi_version() != VMTIDE_ABI_VERSION)
        return 2;
    snprintf(image_path, sizeof image_path, "%s/web.vhdx", argv[1]);
    snprintf(repository_path, sizeof repository_path, "%s/repository", argv[1]);

    must(vmtide_image_create(image_path, 64 * MIB, NULL, &error), &error, "create the image");
    must(vmtide_image_open(image_path, &writable, &image, &error), &error, "open the image");
    for (at = 0; at < 8; at++) {
        memset(block, 'a' + (int)at, MIB);
        must(vmtide_image_write(image, at * MIB, block, MIB, &error), &error, "write");
    }
    must(vmtide_close(image, &error), &error, "close the image");

    must(vmtide_repository_init(repository_path, "secret", 6, &error), &error, "make the repository");
    must(vmtide_repository_open(repository_path, "secret", 6, &repository, &error), &error, "open the repository");
    backup(repository, image_path, NULL, 0);

    must(vmtide_image_open(image_path, &writable, &image, &error), &error, "open the image again");
    memset(block, 'Z', MIB);
    must(vmtide_image_write(image, changed.offset, block, MIB, &error), &error, "write again");
    must(vmtide_close(image, &error), &error, "close the image again");
    backup(repository, image_path, &changed, 1);

    must(vmtide_repository_open_disk(repository, "web@latest", NULL, &disk, &error), &error, "open the point");
    must(vmtide_image_size(disk, &size, &error), &error, "ask for the size");
    must(vmtide_image_read(disk, changed.offset, back, MIB, &error), &error, "read the point");
    if (size != 64 * MIB || memcmp(block, back, MIB) != 0) {
        fprintf(stderr, "the restore point holds something else\n");
        return 1;
    }
    must(vmtide_close(disk, &error), &error, "close the point");
    must(vmtide_close(repository, &error), &error, "close the repository");
    free(block);
    free(back);
    printf("%llu handles left open\n", (unsigned long long)vmtide_open_handles());
    return vmtide_open_handles() == 0 ? 0 : 1;
}
