# Files with known contents, and a manifest of their checksums beside them, on every disk.
#
# A manifest replaces its predecessor by a rename, after the files it names are durable, and files are removed
# after the manifest that no longer names them is durable. So at every moment, power cut or not, each file in the
# manifest is there and whole. The generation in a manifest counts commands; the system disk gets a generation
# before the data disk, so in any image of one moment data is the same generation or one behind.

# 8 MiB of random bytes and as much of text, what contents are cut from: files can be up to that long.
MATERIAL=/usr/share/vmtide
MANIFESTS="/srv /data"

# mounted PLACE: the data disk may be absent.
mounted() {
    [ "$1" = /srv ] || grep -q " $1 ext4 " /proc/mounts
}

generation_of() {
    number="$(sed -n 's/^# generation //p' "$1/manifest" 2>/dev/null)"
    echo "${number:-0}"
}

entries_of() {
    grep -v '^#' "$1/manifest" 2>/dev/null
}

# content SEED INDEX KIB: a first line of its own, then KIB KiB: random data for even files, text for odd ones.
content() {
    material=noise
    [ $(($2 % 2)) -eq 0 ] || material=log
    blocks=$((($3 + 3) / 4))
    echo "seed $1 file $2"
    dd if="$MATERIAL/$material" bs=4096 skip=$((($1 * 7919 + $2 * 104729) % (2049 - blocks))) count="$blocks" 2>/dev/null
}

# replace_manifest PLACE GENERATION: makes PLACE/manifest.new the manifest, with that generation.
replace_manifest() {
    { echo "# generation $2"; cat "$1/manifest.new"; } >"$1/manifest.ready" && sync &&
        mv "$1/manifest.ready" "$1/manifest" && sync && rm -f "$1/manifest.new"
}

# write_files SEED COUNT KIB
write_files() {
    if [ "$3" -lt 1 ] || [ "$3" -gt 8192 ]; then
        echo "ERROR a file has 1 to 8192 KiB"
        return
    fi
    for place in $MANIFESTS; do
        mounted "$place" || continue
        entries_of "$place" >"$place/manifest.new"
        index=0
        while [ "$index" -lt "$2" ]; do
            name="files/$1-$index"
            content "$1" "$index" "$3" >"$place/$name"
            # The checksum is of what was meant to be written, not of what reads back.
            sum="$(content "$1" "$index" "$3" | sha256sum)"
            if [ "$(stat -c %s "$place/$name")" -lt $(($3 * 1024)) ]; then
                echo "ERROR cannot write $place/$name: the disk is full"
                return
            fi
            echo "${sum%% *}  $name" >>"$place/manifest.new"
            index=$((index + 1))
        done
        sync
        replace_manifest "$place" $(($(generation_of "$place") + 1)) || { echo "ERROR cannot write $place/manifest"; return; }
    done
    echo "OK written $2 generation $(generation_of /srv)"
}

delete_files() {
    for place in $MANIFESTS; do
        mounted "$place" || continue
        entries_of "$place" | head -n "$1" >/run/doomed
        entries_of "$place" | tail -n "+$(($1 + 1))" >"$place/manifest.new"
        replace_manifest "$place" $(($(generation_of "$place") + 1)) || { echo "ERROR cannot write $place/manifest"; return; }
        while read -r _ name; do
            rm -f "$place/$name"
        done </run/doomed
        sync
    done
    echo "OK deleted $1 generation $(generation_of /srv)"
}

# check_files: CHECK OK, or what is wrong; then files, and per disk the generation and the manifest's own checksum.
check_files() {
    total=0
    details=""
    for place in $MANIFESTS; do
        mounted "$place" || continue
        entries_of "$place" >/run/expected
        count="$(wc -l </run/expected)"
        total=$((total + count))
        if [ "$count" -gt 0 ] && ! (cd "$place" && sha256sum -c /run/expected >/run/result 2>&1); then
            echo "CHECK FAILED on $place: $(grep -v ': OK$' /run/result | head -n 3 | tr '\n' ';')"
            return
        fi
        sum="$(sha256sum <"$place/manifest" 2>/dev/null)"
        details="$details $place=$(generation_of "$place"):${sum%% *}"
    done
    echo "CHECK OK $total files$details"
}
