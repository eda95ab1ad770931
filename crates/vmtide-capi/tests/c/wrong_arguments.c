/* Wrong arguments of every kind: each must be an error, and nothing may be left open. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vmtide.h>

static int failed;

static void expect(int line, vmtide_status got, vmtide_status wanted, vmtide_error error) {
    if (got != wanted) {
        const char *message = vmtide_error_message(error);
        fprintf(stderr, "line %d: status %d instead of %d: %s\n", line, (int)got, (int)wanted, message ? message : "-");
        failed = 1;
    }
    if (wanted != VMTIDE_OK) {
        const char *message = vmtide_error_message(error);
        if (vmtide_error_status(error) != wanted || !message || strchr(message, '\n') || strlen(message) < 8) {
            fprintf(stderr, "line %d: the error object is not right\n", line);
            failed = 1;
        }
        if (vmtide_close(error, NULL) != VMTIDE_OK)
            failed = 1;
    } else if (error != 0) {
        fprintf(stderr, "line %d: an error object on success\n", line);
        failed = 1;
    }
}
#define EXPECT(call, wanted)                        \
    do {                                            \
        vmtide_error error = 77;                    \
        vmtide_status status = (call);              \
        expect(__LINE__, status, (wanted), error);  \
    } while (0)

static int32_t stop(void *context, uint64_t done, uint64_t total, uint64_t moved) {
    (void)context, (void)done, (void)total, (void)moved;
    return 1;
}
static int32_t no_room(void *context, const void *data, uint64_t length) {
    (void)context, (void)data, (void)length;
    return -1;
}
static int64_t read_lies(void *context, void *buffer, uint64_t capacity) {
    (void)context, (void)buffer;
    return (int64_t)capacity + 1;
}
static int64_t read_fails(void *context, void *buffer, uint64_t capacity) {
    (void)context, (void)buffer, (void)capacity;
    return -1;
}

int main(int argc, char **argv) {
    static const char bad_utf8[] = "/tmp/\xff\xfe";
    char image_path[4096], other_path[4096], repository_path[4096], buffer[4096];
    vmtide_image image = 0, out = 0;
    vmtide_repository repository = 0;
    vmtide_cancel cancel = 0;
    vmtide_text text = 0;
    vmtide_extent extents[4];
    uint64_t count = 0, size = 0;
    vmtide_handle kinds[4];
    size_t kind;
    if (argc != 2)
        return 2;
    snprintf(image_path, sizeof image_path, "%s/a.vhdx", argv[1]);
    snprintf(other_path, sizeof other_path, "%s/other.raw", argv[1]);
    snprintf(repository_path, sizeof repository_path, "%s/repo", argv[1]);

    /* Strings. */
    EXPECT(vmtide_image_open(NULL, NULL, &out, &error), VMTIDE_INVALID);
    EXPECT(vmtide_image_open(bad_utf8, NULL, &out, &error), VMTIDE_INVALID);
    EXPECT(vmtide_image_open("", NULL, &out, &error), VMTIDE_INVALID);
    EXPECT(vmtide_image_open(image_path, NULL, NULL, &error), VMTIDE_INVALID);
    EXPECT(vmtide_image_open(image_path, NULL, &out, &error), VMTIDE_NOT_FOUND);
    EXPECT(vmtide_image_open("gopher://x", NULL, &out, &error), VMTIDE_INVALID);
    EXPECT(vmtide_image_create(image_path, 0, NULL, &error), VMTIDE_INVALID);
    {
        vmtide_new_options options = {.struct_size = sizeof options, .format = "bmp"};
        EXPECT(vmtide_image_create(image_path, 1 << 20, &options, &error), VMTIDE_INVALID);
        options.format = NULL;
        options.flags = 1u << 30;
        EXPECT(vmtide_image_create(image_path, 1 << 20, &options, &error), VMTIDE_INVALID);
        options.flags = 0;
        options.struct_size = 0;
        EXPECT(vmtide_image_create(image_path, 1 << 20, &options, &error), VMTIDE_INVALID);
        options.struct_size = UINT64_MAX;
        EXPECT(vmtide_image_create(image_path, 1 << 20, &options, &error), VMTIDE_INVALID);
    }
    { /* A structure of a later version: taken while what it adds is zero. */
        struct {
            vmtide_open_options known;
            uint64_t later;
        } options = {.known = {.struct_size = sizeof options}};
        EXPECT(vmtide_image_create(image_path, 1 << 20, NULL, &error), VMTIDE_OK);
        EXPECT(vmtide_image_open(image_path, &options.known, &image, &error), VMTIDE_OK);
        options.later = 1;
        EXPECT(vmtide_image_open(image_path, &options.known, &out, &error), VMTIDE_UNSUPPORTED);
        /* A size that no version had: it would cut a member. */
        options.known.format = "raw";
        for (size = 0; size < sizeof options.known; size++) {
            if (size == offsetof(vmtide_open_options, backing_format)) {
                /* The size of 0.1, which ended before this member. */
                continue;
            }
            options.known.struct_size = size;
            EXPECT(vmtide_image_open(image_path, &options.known, &out, &error), VMTIDE_INVALID);
        }
    }

    /* Lengths and offsets. */
    EXPECT(vmtide_image_read(image, 0, buffer, UINT64_MAX, &error), VMTIDE_INVALID);
    EXPECT(vmtide_image_read(image, UINT64_MAX, buffer, 2, &error), VMTIDE_INVALID);
    EXPECT(vmtide_image_read(image, 1 << 20, buffer, 1, &error), VMTIDE_INVALID);
    EXPECT(vmtide_image_read(image, 0, NULL, 1, &error), VMTIDE_INVALID);
    EXPECT(vmtide_image_read(image, 0, NULL, 0, &error), VMTIDE_OK);
    EXPECT(vmtide_image_read(image, 0, buffer, sizeof buffer, &error), VMTIDE_OK);
    EXPECT(vmtide_image_extents(image, 0, UINT64_MAX, extents, 4, &count, &error), VMTIDE_INVALID);
    EXPECT(vmtide_image_extents(image, 0, 1 << 20, NULL, 4, &count, &error), VMTIDE_INVALID);
    EXPECT(vmtide_image_extents(image, 0, 1 << 20, extents, 0, &count, &error), VMTIDE_INVALID);
    EXPECT(vmtide_image_extents(image, 0, 1 << 20, extents, 4, NULL, &error), VMTIDE_INVALID);
    EXPECT(vmtide_image_extents(image, 0, 1 << 20, extents, 4, &count, &error), VMTIDE_OK);
    if (count != 1 || extents[0].kind != VMTIDE_EXTENT_UNALLOCATED || extents[0].length != 1 << 20)
        failed = 1;

    /* What is open for reading only. */
    EXPECT(vmtide_image_write(image, 0, buffer, 512, &error), VMTIDE_UNSUPPORTED);
    EXPECT(vmtide_image_write_zeroes(image, 0, 512, &error), VMTIDE_UNSUPPORTED);
    EXPECT(vmtide_image_flush(image, &error), VMTIDE_UNSUPPORTED);
    EXPECT(vmtide_image_resize(image, 2 << 20, &error), VMTIDE_UNSUPPORTED);
    EXPECT(vmtide_image_size(image, NULL, &error), VMTIDE_INVALID);

    /* Repositories. */
    EXPECT(vmtide_repository_init("ftp://x", NULL, 0, &error), VMTIDE_INVALID);
    EXPECT(vmtide_repository_init(repository_path, NULL, 5, &error), VMTIDE_INVALID);
    EXPECT(vmtide_repository_open(repository_path, "x", 1, &repository, &error), VMTIDE_NOT_FOUND);
    EXPECT(vmtide_repository_init(repository_path, "right", 5, &error), VMTIDE_OK);
    EXPECT(vmtide_repository_init(repository_path, "right", 5, &error), VMTIDE_FAILED);
    EXPECT(vmtide_repository_open(repository_path, "wrong", 5, &repository, &error), VMTIDE_DENIED);
    EXPECT(vmtide_repository_open(repository_path, "x", UINT64_MAX, &repository, &error), VMTIDE_INVALID);
    EXPECT(vmtide_repository_open(repository_path, NULL, 0, &repository, &error), VMTIDE_INVALID);
    EXPECT(vmtide_repository_open(repository_path, "right", 5, &repository, &error), VMTIDE_OK);
    EXPECT(vmtide_repository_open_disk(repository, "web@latest", NULL, &out, &error), VMTIDE_NOT_FOUND);
    EXPECT(vmtide_repository_points(repository, "nobody", &text, &error), VMTIDE_NOT_FOUND);
    EXPECT(vmtide_repository_points(repository, NULL, &text, &error), VMTIDE_OK);
    EXPECT(vmtide_cancel_new(&cancel, &error), VMTIDE_OK);
    EXPECT(vmtide_cancel_new(NULL, &error), VMTIDE_INVALID);
    if (vmtide_text_size(text) != strlen(vmtide_text_data(text)))
        failed = 1;

    EXPECT(vmtide_close(text, &error), VMTIDE_OK);

    /* Jobs. */
    {
        vmtide_range huge = {.offset = UINT64_MAX, .length = 2}, outside = {.offset = 1 << 20, .length = 512};
        vmtide_backup_options options = {.struct_size = sizeof options, .changes = &huge, .changes_count = 1};
        vmtide_watch watch = {.struct_size = sizeof watch, .progress = stop};
        vmtide_delta_options delta = {.struct_size = sizeof delta};
        vmtide_open_options open = {.struct_size = sizeof open};
        EXPECT(vmtide_backup(repository, image_path, &options, NULL, &text, &error), VMTIDE_INVALID);
        options.flags = VMTIDE_BACKUP_CHANGES;
        EXPECT(vmtide_backup(repository, image_path, &options, NULL, &text, &error), VMTIDE_INVALID);
        options.changes = &outside;
        EXPECT(vmtide_backup(repository, image_path, &options, NULL, &text, &error), VMTIDE_INVALID);
        options.changes = NULL;
        EXPECT(vmtide_backup(repository, image_path, &options, NULL, &text, &error), VMTIDE_INVALID);
        options.changes_count = UINT64_MAX;
        EXPECT(vmtide_backup(repository, image_path, &options, NULL, &text, &error), VMTIDE_INVALID);
        options.changes_count = 0;
        options.level = 9;
        EXPECT(vmtide_backup(repository, image_path, &options, NULL, &text, &error), VMTIDE_INVALID);
        EXPECT(vmtide_backup(repository, image_path, NULL, NULL, NULL, &error), VMTIDE_INVALID);
        watch.cancel = image;
        EXPECT(vmtide_backup(repository, image_path, NULL, &watch, &text, &error), VMTIDE_BAD_HANDLE);
        watch.cancel = cancel;
        EXPECT(vmtide_cancel_request(cancel, &error), VMTIDE_OK);
        EXPECT(vmtide_backup(repository, image_path, NULL, &watch, &text, &error), VMTIDE_CANCELLED);
        EXPECT(vmtide_delta_create(image_path, &delta, NULL, NULL, NULL, NULL, &text, &error), VMTIDE_INVALID);
        EXPECT(vmtide_delta_create(image_path, &delta, other_path, no_room, NULL, NULL, &text, &error), VMTIDE_INVALID);
        EXPECT(vmtide_delta_create(image_path, &delta, NULL, no_room, NULL, NULL, &text, &error), VMTIDE_INVALID);
        delta.base_options = &open; /* Without a base. */
        EXPECT(vmtide_delta_create(image_path, &delta, NULL, no_room, NULL, NULL, &text, &error), VMTIDE_INVALID);
        delta.base = image_path;
        open.flags = VMTIDE_OPEN_WRITABLE;
        EXPECT(vmtide_delta_create(image_path, &delta, NULL, no_room, NULL, NULL, &text, &error), VMTIDE_INVALID);
        delta.base_options = NULL, delta.source_options = &open;
        EXPECT(vmtide_delta_create(image_path, &delta, NULL, no_room, NULL, NULL, &text, &error), VMTIDE_INVALID);
        open.flags = 0, open.format = "bmp";
        EXPECT(vmtide_delta_create(image_path, &delta, NULL, no_room, NULL, NULL, &text, &error), VMTIDE_INVALID);
        open.format = NULL;
        EXPECT(vmtide_delta_create(image_path, &delta, NULL, no_room, NULL, NULL, &text, &error), VMTIDE_FAILED);
        delta.level = 99;
        EXPECT(vmtide_delta_create(image_path, &delta, NULL, no_room, NULL, NULL, &text, &error), VMTIDE_INVALID);
        EXPECT(vmtide_delta_apply(NULL, read_lies, NULL, image_path, NULL, NULL, &text, &error), VMTIDE_FAILED);
        EXPECT(vmtide_delta_apply(NULL, read_fails, NULL, image_path, NULL, NULL, &text, &error), VMTIDE_FAILED);
        EXPECT(vmtide_delta_apply(image_path, NULL, NULL, image_path, NULL, NULL, &text, &error), VMTIDE_DAMAGED);
        EXPECT(vmtide_delta_merge(NULL, 3, NULL, other_path, NULL, NULL, NULL, &text, &error), VMTIDE_INVALID);
        EXPECT(vmtide_delta_info(image_path, 1, &text, &error), VMTIDE_DAMAGED);
    }
    /* Failed calls took the place of the text that was there. */
    if (text != 0)
        failed = 1;
    EXPECT(vmtide_repository_points(repository, NULL, &text, &error), VMTIDE_OK);

    /* Handles of every kind, in every place they do not belong, before and after they are closed. */
    kinds[0] = image, kinds[1] = repository, kinds[2] = cancel, kinds[3] = text;
    for (int round = 0; round < 2; round++) {
        for (kind = 0; kind < 4; kind++) {
            vmtide_handle handle = kinds[kind];
            if (kind != 0 || round == 1)
                EXPECT(vmtide_image_size(handle, &size, &error), VMTIDE_BAD_HANDLE);
            if (kind != 1 || round == 1)
                EXPECT(vmtide_repository_points(handle, NULL, &out, &error), VMTIDE_BAD_HANDLE);
            if (kind != 2 || round == 1)
                EXPECT(vmtide_cancel_request(handle, &error), VMTIDE_BAD_HANDLE);
            if ((kind != 3 || round == 1) && (vmtide_text_data(handle) || vmtide_text_size(handle)))
                failed = 1;
            if (vmtide_error_status(handle) != VMTIDE_BAD_HANDLE || vmtide_error_message(handle))
                failed = 1;
            EXPECT(vmtide_close(handle, &error), round == 0 ? VMTIDE_OK : VMTIDE_BAD_HANDLE);
        }
    }
    EXPECT(vmtide_close(0, &error), VMTIDE_BAD_HANDLE);
    EXPECT(vmtide_close(UINT64_MAX, &error), VMTIDE_BAD_HANDLE);
    EXPECT(vmtide_image_read(12345, 0, buffer, 1, &error), VMTIDE_BAD_HANDLE);
    /* Without anywhere to put the error. */
    if (vmtide_image_open(NULL, NULL, NULL, NULL) != VMTIDE_INVALID)
        failed = 1;
    if (vmtide_open_handles() != 0) {
        fprintf(stderr, "%llu handles are left\n", (unsigned long long)vmtide_open_handles());
        failed = 1;
    }
    puts(failed ? "FAILED" : "all wrong arguments are errors");
    return failed;
}
