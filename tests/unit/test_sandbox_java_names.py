"""Names of Java sources."""

from __future__ import annotations

import pytest

from services.sandbox.languages.java_names import find_java_names

MAIN = "public static void main(String[] args) { System.out.println(1); }"


@pytest.mark.parametrize(
    ("source", "path", "main"),
    [
        (f"public class Main {{ {MAIN} }}", "Main.java", "Main"),
        (f"import java.util.*;\npublic class Sum {{ {MAIN} }}", "Sum.java", "Sum"),
        (f"class Helper {{ }}\nclass Solution {{ {MAIN} }}", "Solution.java", "Solution"),
        (f"public class Api {{ }}\nclass Run {{ {MAIN} }}", "Api.java", "Run"),
        (f"class A {{ {MAIN} }}\npublic final class B {{ {MAIN} }}", "B.java", "B"),
        (f"package a.b;\npublic class C {{ {MAIN} }}", "a/b/C.java", "a.b.C"),
        (f"/* package x; public class No {{}} */ // public class No\npublic class D {{ {MAIN} }}", "D.java", "D"),
        (f"public class E {{ String s = \"public class No {{\"; char c = '{{'; {MAIN} }}", "E.java", "E"),
        (f"public class F {{ static class Inner {{ }} public static class G {{ }} {MAIN} }}", "F.java", "F"),
        ("public interface I { static void main(String... args) { } }", "I.java", "I"),
        ("public record R(int x) { public static void main(String[] a) { } }", "R.java", "R"),
        ("class Broken {", "Main.java", "Main"),
        ("", "Main.java", "Main"),
    ],
)
def test_the_source_says_its_names(source: str, path: str, main: str) -> None:
    names = find_java_names(source.encode())
    assert (names.source, names.main) == (path, main)


def test_a_name_that_no_file_can_have_is_left_to_the_compiler() -> None:
    assert find_java_names(f"public class {'a' * 300} {{}}".encode()).source == "Main.java"


@pytest.mark.parametrize("part", ["static ", "final ", "/* ", '\\"', "class A{}", 'class A{"'])
def test_sources_of_repeated_words_take_no_longer_than_others(part: str) -> None:
    source = f'class B {{ "{part * 30_000}'
    assert find_java_names(source.encode()).main
    assert find_java_names(part.encode() * 30_000).main


@pytest.mark.parametrize("name", [".tmp.x", "...", "a..b"])
def test_a_package_without_a_name_leaves_the_source_in_its_folder(name: str) -> None:
    assert find_java_names(f"package {name}; class A {{}}".encode()).source == "Main.java"
