/* A program of the days of libvmtide 0.1. What stands beside it, program-0.1-x86_64-linux, is this, compiled against the header
 * of that version (archive.sh) and never again: the tests run the old file against the library of today. It uses every kind of
 * handle, structure, callback and answer that 0.1 had.
 *
 *   program DIRECTORY
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vmtide.h>

#define MIB (1024u * 1024u)

static char path[8][4096];
static char block[MIB], back[MIB];

static void must(vmtide_status status, const vmtide_error *error, const char *what) {
    if (status == VMTIDE_OK)
        return;
    fprintf(stderr, "%s: %s (status %d)\n", what, vmtide_error_message(*error), (int)status);
    exit(1);
}

static void check(int right, const char *what) {
    if (right)
        return;
    fprintf(stderr, "%s: not as it was in 0.1\n", what);
    exit(1);
}

static int32_t count_progress(void *context, uint64_t done, uint64_t total, uint64_t moved) {
    ++*(uint64_t *)context;
    return total && (done > total || moved > total + done);
}

static void see_json(void *context, const char *json) {
    check(context != NULL && json[0] == '{', "a message");
}

/* A delta in memory. */
struct bytes {
    char *data;
    uint64_t length, taken;
};

static int32_t take(void *context, const void *data, uint64_t length) {
    struct bytes *bytes = context;
    bytes->data = realloc(bytes->data, bytes->length + length);
    memcpy(bytes->data + bytes->length, data, length);
    bytes->length += length;
    return 0;
}

static int64_t give(void *context, void *buffer, uint64_t capacity) {
    struct bytes *bytes = context;
    uint64_t length = bytes->length - bytes->taken;
    if (length > capacity)
        length = capacity;
    memcpy(buffer, bytes->data + bytes->taken, length);
    bytes->taken += length;
    return (int64_t)length;
}

static void write_letter(const char *image_path, uint64_t offset, char letter) {
    vmtide_open_options writable = {.struct_size = sizeof writable, .flags = VMTIDE_OPEN_WRITABLE};
    vmtide_image image;
    vmtide_error error;
    memset(block, letter, MIB);
    must(vmtide_image_open(image_path, &writable, &image, &error), &error, "open for writing");
    must(vmtide_image_write(image, offset, block, MIB, &error), &error, "write");
    must(vmtide_image_flush(image, &error), &error, "flush");
    must(vmtide_close(image, &error), &error, "close");
}

static void is_letter(vmtide_image image, uint64_t offset, char letter, const char *what) {
    vmtide_error error;
    memset(block, letter, MIB);
    must(vmtide_image_read(image, offset, back, MIB, &error), &error, what);
    check(memcmp(block, back, MIB) == 0, what);
}

static void images(void) {
    vmtide_new_options new_image = {.struct_size = sizeof new_image, .format = "vhdx", .block_size_bytes = 2 * MIB};
    vmtide_new_options raw = {.struct_size = sizeof raw, .format = "raw", .flags = VMTIDE_NEW_OVERWRITE};
    vmtide_open_options writable = {.struct_size = sizeof writable, .flags = VMTIDE_OPEN_WRITABLE};
    vmtide_extent extents[4];
    vmtide_image image;
    vmtide_text text;
    vmtide_error error;
    uint64_t size = 0, count = 0;
    must(vmtide_image_create(path[0], 32 * MIB, &new_image, &error), &error, "create");
    write_letter(path[0], 0, 'a');
    write_letter(path[0], 8 * MIB, 'b');
    must(vmtide_image_open(path[0], &writable, &image, &error), &error, "open");
    must(vmtide_image_write_zeroes(image, 8 * MIB, 65536, &error), &error, "zeros");
    must(vmtide_image_resize(image, 40 * MIB, &error), &error, "resize");
    must(vmtide_image_size(image, &size, &error), &error, "size");
    must(vmtide_image_extents(image, 0, size, extents, 4, &count, &error), &error, "extents");
    check(size == 40 * MIB && count >= 2 && extents[0].kind == VMTIDE_EXTENT_DATA && extents[1].kind != VMTIDE_EXTENT_DATA,
          "size and extents");
    check(vmtide_image_read(image, size, back, 1, &error) == VMTIDE_INVALID && vmtide_error_status(error) == VMTIDE_INVALID,
          "a read past the end");
    check(strlen(vmtide_error_message(error)) > 10, "the message of an error");
    vmtide_close(error, NULL);
    must(vmtide_close(image, &error), &error, "close");
    check(vmtide_close(image, NULL) == VMTIDE_BAD_HANDLE, "a closed handle");
    must(vmtide_image_info(path[0], NULL, &text, &error), &error, "information");
    check(strstr(vmtide_text_data(text), "vhdx") && strlen(vmtide_text_data(text)) == vmtide_text_size(text), "information");
    vmtide_close(text, NULL);
    must(vmtide_convert(path[0], NULL, path[1], &raw, NULL, &text, &error), &error, "convert");
    vmtide_close(text, NULL);
}

static void repositories(void) {
    uint64_t told = 0;
    vmtide_watch watch = {.struct_size = sizeof watch, .context = &told, .progress = count_progress, .message = see_json};
    vmtide_range changed = {.offset = 4 * MIB, .length = MIB};
    vmtide_backup_options options = {.struct_size = sizeof options, .name = "vm", .state_directory = path[3]};
    vmtide_new_options raw = {.struct_size = sizeof raw, .format = "raw"};
    vmtide_repository repository;
    vmtide_image disk;
    vmtide_text text;
    vmtide_ranges ranges;
    vmtide_cancel cancel;
    vmtide_error error;
    must(vmtide_repository_init(path[2], "secret", 6, &error), &error, "make a repository");
    check(vmtide_repository_open(path[2], "wrong", 5, &repository, NULL) == VMTIDE_DENIED && repository == 0, "a wrong password");
    must(vmtide_repository_open(path[2], "secret", 6, &repository, &error), &error, "open a repository");
    must(vmtide_backup(repository, path[0], &options, &watch, &text, &error), &error, "full");
    check(strstr(vmtide_text_data(text), "\"level\":\"full\"") && told > 0, "a full backup");
    vmtide_close(text, NULL);
    write_letter(path[0], changed.offset, 'c');
    options.changes = &changed;
    options.changes_count = 1;
    options.flags = VMTIDE_BACKUP_CHANGES;
    must(vmtide_backup(repository, path[0], &options, NULL, &text, &error), &error, "incremental");
    check(strstr(vmtide_text_data(text), "\"level\":\"incremental\"") != NULL, "an incremental backup");
    vmtide_close(text, NULL);
    must(vmtide_repository_points(repository, "vm", &text, &error), &error, "points");
    check(strstr(vmtide_text_data(text), "\"points\":[{") != NULL, "points");
    vmtide_close(text, NULL);
    must(vmtide_repository_open_disk(repository, "vm@latest", NULL, &disk, &error), &error, "open a point");
    is_letter(disk, 0, 'a', "the point's first MiB");
    is_letter(disk, changed.offset, 'c', "the point's changed MiB");
    vmtide_close(disk, NULL);
    must(vmtide_restore(repository, "vm@latest", NULL, path[4], &raw, NULL, &text, &error), &error, "restore");
    vmtide_close(text, NULL);
    must(vmtide_cancel_new(&cancel, &error), &error, "a flag");
    must(vmtide_cancel_request(cancel, &error), &error, "a request to end");
    watch.cancel = cancel;
    check(vmtide_backup(repository, path[0], &options, &watch, &text, NULL) == VMTIDE_CANCELLED && text == 0, "a call that is ended");
    vmtide_close(cancel, NULL);
    must(vmtide_tracking_enable(path[1], NULL, 0, &error), &error, "no tracking");
    check(vmtide_tracking_changes(path[1], NULL, "none", &ranges, NULL) != VMTIDE_OK && ranges == 0, "changes since nothing");
    vmtide_close(repository, NULL);
}

static void deltas(void) {
    vmtide_open_options raw = {.struct_size = sizeof raw, .format = "raw"};
    vmtide_delta_options options = {.struct_size = sizeof options, .base = path[1], .base_id = "one", .new_id = "two"};
    vmtide_apply_options onto = {.struct_size = sizeof onto, .format = "raw", .target_id = "one"};
    struct bytes delta = {0};
    vmtide_text text;
    vmtide_image image;
    vmtide_error error;
    options.source_options = options.base_options = &raw;
    must(vmtide_delta_create(path[4], &options, NULL, take, &delta, NULL, &text, &error), &error, "a delta by callback");
    vmtide_close(text, NULL);
    must(vmtide_delta_create(path[4], &options, path[5], NULL, NULL, NULL, &text, &error), &error, "a delta in a file");
    vmtide_close(text, NULL);
    must(vmtide_delta_info(path[5], 1, &text, &error), &error, "a delta's information");
    check(strstr(vmtide_text_data(text), "two") != NULL && delta.length > 400, "a delta's information");
    vmtide_close(text, NULL);
    must(vmtide_delta_apply(NULL, give, &delta, path[1], &onto, NULL, &text, &error), &error, "apply by callback");
    vmtide_close(text, NULL);
    must(vmtide_image_open(path[1], &raw, &image, &error), &error, "open what was applied to");
    is_letter(image, 4 * MIB, 'c', "what was applied");
    vmtide_close(image, NULL);
    free(delta.data);
}

int main(int argc, char **argv) {
    static const char *const names[] = {"disk.vhdx", "disk.raw", "repository", "state", "restored.raw", "file.delta"};
    size_t at;
    if (argc != 2 || vmtide_abi_version() != VMTIDE_ABI_VERSION)
        return 2;
    for (at = 0; at < sizeof names / sizeof *names; at++)
        snprintf(path[at], sizeof path[at], "%s/%s", argv[1], names[at]);
    images();
    repositories();
    deltas();
    printf("a program of 0.1 with libvmtide %s: %u handles left\n", vmtide_version(), (unsigned)vmtide_open_handles());
    return vmtide_open_handles() != 0;
}
