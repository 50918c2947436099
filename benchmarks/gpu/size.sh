# Sourced by the packing scripts: what a pack weighs together with the working tree, which travels with it.

mib() { awk -v bytes="$1" 'BEGIN { printf "%.1f MiB", bytes / 1048576 }'; }
bytes() { find "$@" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }'; }

within_limit() { # within_limit FOLDER CURE: print the sizes; fail with the cure above LIMIT_MIB (64)
    local limit=${LIMIT_MIB:-64} packed tree
    packed=$(bytes "$1")
    tree=$(git ls-files -coz --exclude-standard | { xargs -0r stat -c %s 2>/dev/null || true; } |
        awk '{ sum += $1 } END { print sum + 0 }')
    (cd "$1" && find . -type f -size +1000k -printf '%s %P\n' | sort -rn) | while read -r size name; do
        echo "  $name: $(mib "$size")"
    done
    echo "packed $(mib "$packed"), working tree $(mib "$tree"), together $(mib $((packed + tree))) of $limit MiB"
    ((packed + tree <= limit * 1048576)) || fail "pack and working tree exceed $limit MiB together; $2."
}
