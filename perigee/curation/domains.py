"""Tags prompts by domain: a tag that is there stays; else the verifier, LaTeX and words of the text decide.

A rule per domain; each of its patterns that is found counts once, and the domain with the most wins. Ties go to the
rule that comes first, so special domains stand before general ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from perigee.curation.findings import Finding, Question

# Special domains stand before general ones.
_LINES = {
    "calculus": r"""
        \\int(?![a-z])|\bintegra(?:l|te|tion)
        \\lim(?![a-z])|\blimit\b
        \bderivative|\bdifferentia|\\frac\{d
        \\partial
        \bconverge|\bdiverge
        \btaylor\b|\bmaclaurin\b
        \\nabla|\bgradient\b
        \bcontinuous\b
    """,
    "linear-algebra": r"""
        \bmatri(?:x|ces)\b|\\begin\{[bpv]?matrix
        \beigen
        \bdeterminant\b|\\det(?![a-z])
        \blinearly independent\b
        \bvector space\b|\bsubspace\b
        \bvectors?\b
        \bspan\b|\bbasis\b
    """,
    "probability": r"""
        \bprobabilit
        \bdice\b|\bdie is\b|\bcoins? (?:is|are|shows?|lands?)|\bfair (?:coin|die)
        \bexpected\b
        \bat random\b|\brandomly\b
        \bvariance\b|\bstandard deviation\b|\brandom variable\b
        \bodds\b
    """,
    "statistics": r"""
        \bmedian\b
        \bmean of\b|\baverage of\b
        \bmode of\b
        \bdata set\b|\bdataset\b|\bsurvey
        \bpercentile|\bquartile
        \bcorrelat|\bregression\b
        \bhistogram\b|\bbar chart\b
    """,
    "number-theory": r"""
        \bprimes?\b
        \bdivisors?\b|\bdivisible\b|\bdivides\b|\bmultiples? of\b
        \bremainder\b|\\pmod|\\bmod|\bmodulo\b
        \bgcd\b|\blcm\b|\bgreatest common\b|\bleast common\b
        \bcoprime\b|\brelatively prime\b
        \bdigits?\b
        \bperfect (?:square|cube|power)
        \bintegers?\b
        \bbase[- ](?:two|ten|\d+|[bn]\b)|\bbinary\b
    """,
    "combinatorics": r"""
        \bhow many (?:different |distinct )?(?:ways|arrangements|permutations|combinations|paths|orders|sequences)\b
        \bin how many ways\b
        \bpermutation|\bcombination
        \\binom|\bbinomial coefficient|\bchoose \d
        \bseated\b|\barranged?\b
        \bsubsets?\b
        \bpigeonhole\b
        \bgraph\b.*\b(?:vertex|vertices|edges?)\b
        \bcolou?rings?\b|\bcolou?red\b
    """,
    "geometry": r"""
        \btriangles?\b|\\triangle
        \bcircles?\b|\bcircum|\bradius\b|\bdiameter\b
        \bangles?\b|\\angle|\bdegrees?\b|\^\\circ
        \bpolygon|\bquadrilateral|\brectangle|\bsquare (?:with|of side)|\b(?:hexa|penta)gon|\btrapezoid|\bparallelogram
        \bperimeter\b|\barea\b|\bvolume\b|\bsurface area\b
        \bcubes?\b|\bsphere|\bcone\b|\bcylinder|\bpyramid|\btetrahedr
        \bparallel\b|\bperpendicular\b|\bbisect|\btangent to\b
        \bhypotenuse\b|\baltitude\b
        \bcoordinate|\bmidpoint\b
    """,
    "trigonometry": r"""
        \\?\bsin\b|\\sin
        \\?\bcos\b|\\cos
        \\?\btan\b|\\tan
        \btrigonometr|\bsine\b|\bcosine\b
    """,
    "algebra": r"""
        \bequations?\b
        \bpolynomial|\bquadratic\b|\broots? of\b
        \bsolve\b|\bsolutions?\b
        \bfactor(?:ed|ize|ise|s)?\b
        \bf\(x\)|\bfunction\b
        \binequalit
        \bsimplify\b|\bexpand\b
        \blog(?:arithm)?\b|\\log|\\ln(?![a-z])
        \bcomplex number|\\bar z|\bi\^2\b
        \bsequence\b|\barithmetic progression|\bgeometric progression|\bseries\b
        \b\d*[xyz]\b[ ]?[=+^-]|[=+] ?\d*[xyz]\b
        \\sum(?![a-z])|\\prod(?![a-z])
    """,
    "physics": r"""
        \bvelocity\b|\baccelerat
        \bmass of\b|\bkilograms? (?:block|ball)
        \bnewtons?\b|\bjoules?\b|\bwatts?\b|\bvolts?\b|\bamperes?\b|\bohms?\b
        \bforce\b|\bmomentum\b|\bfriction\b
        \bgravit
        \bcircuit\b|\bresist(?:or|ance)\b|\bcapacitor
        \bwavelength\b|\bfrequency\b|\blens\b
        \bm/s\b|\bkg\b.*\bm\b
        \bkinetic\b|\bpotential energy\b|\bthermodynamic
    """,
    "chemistry": r"""
        \bmol(?:e|es|ar|arity)?\b
        \breaction\b|\breactant|\bcatalys
        \bacid\b|\bbase solution\b|\bpH\b
        \batom(?:s|ic)?\b|\bmolecul|\bions?\b
        \boxid|\breduc(?:tion|ing agent)
        \bperiodic table\b|\belement with\b
        \b(?:H_?2_?O|NaCl|CO_?2|HCl|NaOH|H_?2SO_?4)\b
        \bisotope|\benthalpy\b
    """,
    "biology": r"""
        \bcells?\b.*\b(?:membrane|nucleus|divi)
        \bDNA\b|\bRNA\b|\bgenes?\b|\bgenetic
        \bspecies\b|\borganism|\bevolution
        \bprotein|\benzyme|\bamino acid
        \bphotosynthesis\b|\brespiration\b
        \bbacteria|\bvirus
        \ballele|\bgenotype|\bphenotype
    """,
    "logic": r"""
        \bknights? and knaves?\b|\bknave\b
        \balways (?:lies?|tells? the truth)
        \briddle\b|\bpuzzle\b|\bsudoku\b
        \blogical(?:ly)?\b|\bsyllogism
        \bneither\b.*\bnor\b.*\bwho\b
        \bsits? (?:next to|opposite|between)\b
    """,
    "arithmetic": r"""
        \bhow (?:many|much)\b
        \b(?:dollars?|cents|euros?|pounds)\b|\$\d
        \btotal\b|\baltogether\b|\bin all\b
        \bpercent|%
        \b(?:each|every|per)\b
        \btwice\b|\bhalf\b|\bthird\b
        ^[-\d.()+*/ ]+=?$
        \d\s*[-+*/×÷]\s*\d
        \bleft\b|\bremain
        \b(?:hours?|minutes?|days?|weeks?)\b
    """,
}

RULES: dict[str, tuple[re.Pattern[str], ...]] = {
    name: tuple(re.compile(line.strip(), re.IGNORECASE) for line in lines.strip().splitlines())
    for name, lines in _LINES.items()
}


CODE = "code"
OTHER_MATH = "math"
OTHER = "general"
# Tags that say nothing.
EMPTY_TAGS = {"", "default"}


def find_domains(questions: Iterable[Question]) -> Iterator[Finding]:
    """Yields a finding per prompt, in order, with its `domain` and the evidence for it."""
    for question in questions:
        domain, evidence = tag(question)
        yield Finding(question.id, details={"domain": domain, "evidence": evidence})


def tag(question: Question) -> tuple[str, str]:
    """Returns the domain, and the evidence for it: the input's tag, the verifier, or the words found."""
    if question.domain not in EMPTY_TAGS:
        return question.domain, "tagged already"
    if question.kind == "code":
        return CODE, "verifier code"
    found = {name: [m.group() for p in patterns if (m := p.search(question.text))] for name, patterns in RULES.items()}
    best = max(found, key=lambda name: len(found[name]))
    if not found[best]:
        return (OTHER_MATH if question.kind == "math" else OTHER), f"verifier {question.kind}"
    return best, ", ".join(" ".join(words.split())[:30] for words in found[best])
