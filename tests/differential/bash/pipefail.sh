set -o pipefail
yes | head -n 1
echo $?
false | true
echo $?
