/* A chain whose child does not say of what format its parent is: an error that says so, the parent's bytes where the caller
 * says it, and no look at that member for a program that was built before there was one. */
#include <stdio.h>
#include <string.h>
#include <vmtide.h>

static int fail(const char *what, vmtide_error error)
{
    fprintf(stderr, "%s: %s\n", what, error ? vmtide_error_message(error) : "");
    return 1;
}

int main(int argc, char **argv)
{
    char path[4096];
    unsigned char byte = 0;
    vmtide_image image = 0;
    vmtide_error error = 0;
    vmtide_open_options options = {.struct_size = sizeof options};

    if (argc != 2)
        return 2;
    snprintf(path, sizeof path, "%s/child.qcow2", argv[1]);
    if (vmtide_image_open(path, &options, &image, &error) != VMTIDE_UNSUPPORTED)
        return fail("a parent of unknown format was opened", error);
    vmtide_close(error, NULL), error = 0;
    options.backing_format = "raw";
    options.struct_size = 40;
    if (vmtide_image_open(path, &options, &image, &error) != VMTIDE_UNSUPPORTED)
        return fail("the structure of 0.1 was read past its end", error);
    vmtide_close(error, NULL), error = 0;
    options.struct_size = sizeof options;
    options.backing_format = "bmp";
    if (vmtide_image_open(path, &options, &image, &error) != VMTIDE_INVALID)
        return fail("there is no such format", error);
    vmtide_close(error, NULL), error = 0;
    options.backing_format = "raw";
    if (vmtide_image_open(path, &options, &image, &error) != VMTIDE_OK)
        return fail("the child is not opened", error);
    if (vmtide_image_read(image, 4096, &byte, 1, &error) != VMTIDE_OK || byte != 7)
        return fail("the parent is not read", error);
    vmtide_close(image, NULL);
    puts("the parent is read");
    return 0;
}
