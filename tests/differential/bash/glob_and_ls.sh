touch b a .h; mkdir d; echo *; shopt -s dotglob; echo *; ls -A
