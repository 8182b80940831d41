set -u
echo "$nothing"
