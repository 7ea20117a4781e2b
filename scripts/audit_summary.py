"""Tables of what `audit.sh` found: vulnerabilities, licences that bind more than permissive ones do, vendored scripts, jars.

    python scripts/audit_summary.py VULNERABILITIES.json VENDOR-FOLDER POM
"""

import hashlib
import json
import re
import sys
from importlib import metadata
from pathlib import Path

BINDING = re.compile(r"\b(A?GPL|LGPL|EUPL|MPL|SSPL)\b|GNU (Affero|Lesser|General)|proprietary", re.IGNORECASE)


def licence(distribution: metadata.Distribution) -> str:
    """What a package says of its licence: its expression, its classifiers, or the first line of its text."""
    told = distribution.metadata
    classified = [text.rpartition(" :: ")[2] for text in told.get_all("Classifier") or [] if text.startswith("License ::")]
    return str(told.get("License-Expression") or ", ".join(classified) or (told.get("License") or "not said").splitlines()[0])[:60]


def main(vulnerabilities: Path, vendor: Path, pom: Path) -> int:
    """Print the tables; 1 where something is known, 2 where the service knew none of the packages: that is no clean bill."""
    packages = json.loads(vulnerabilities.read_text())["dependencies"]
    asked = [package for package in packages if "skip_reason" not in package]
    found = [(package, one) for package in asked for one in package["vulns"]]
    print(f"{len(asked)} of {len(packages)} packages could be asked about; {len(found)} known vulnerabilities")
    for package, one in found:
        fixed = ", ".join(one["fix_versions"]) or "no release"
        print(f"  {package['name']} {package['version']}: {one['id']} ({', '.join(one['aliases'])}), fixed in {fixed}")
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    if unknown:
        print(f"  nothing could be learnt about {len(unknown)}: {', '.join(unknown[:5])}{', …' if len(unknown) > 5 else ''}")
    installed = sorted({(str(one.metadata["Name"]), licence(one)) for one in metadata.distributions()})
    binding = [(name, text) for name, text in installed if BINDING.search(text)]
    print(f"{len(installed)} installed; licences other than permissive ones:")
    for name, text in binding:
        print(f"  {name}: {text}")
    print("vendored scripts:")
    for file in sorted(vendor.glob("*.js")):
        print(f"  {file.name} sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}")
    print("jars:", ", ".join(f"{name} {version}" for name, version in re.findall(r"<(\w+)\.version>([^<]+)<", pom.read_text())))
    return 2 if not asked else int(bool(found))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
