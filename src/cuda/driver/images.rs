//! The compiled kernels that this program carries, and which of them a card can run.

/// One `.cu` file, compiled.
pub(super) struct Unit {
    /// The file's name without its extension.
    pub name: &'static str,
    /// Machine code by real architecture (86 for sm_86), ascending, deflated.
    pub cubins: &'static [(u32, &'static [u8])],
    /// PTX by virtual architecture, ascending, deflated, and the kernels in it and in the cubins made from it.
    pub ptx: &'static [(u32, &'static [u8], &'static [&'static str])],
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// What a card of compute capability `major.minor` can load of `unit`.
pub(super) struct Choice {
    /// Its own machine code, or that of an earlier card of the same generation.
    pub cubin: Option<(u32, &'static [u8])>,
    /// What the driver can translate for it.
    pub ptx: Option<(u32, &'static [u8])>,
    /// The kernels in both.
    pub kernels: &'static [&'static str],
}

impl Unit {
    pub fn choose(&self, (major, minor): (u32, u32)) -> Choice {
        let card = 10 * major + minor;
        let cubins = self.cubins.iter().rev();
        let ptx = self.ptx.iter().rev().find(|(base, ..)| *base <= card);
        Choice {
            cubin: cubins
                .copied()
                .find(|(arch, _)| arch / 10 == major && *arch <= card),
            ptx: ptx.map(|(base, text, _)| (*base, *text)),
            kernels: ptx.map_or(&[], |(_, _, kernels)| *kernels),
        }
    }
}

/// The bytes that the build script deflated.
pub(super) fn inflated(packed: &[u8]) -> Vec<u8> {
    miniz_oxide::inflate::decompress_to_vec(packed).expect("deflated by the build script")
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: Unit = Unit {
        name: "test",
        cubins: &[(75, &[]), (80, &[]), (86, &[]), (89, &[]), (90, &[]), (120, &[])],
        ptx: &[(75, &[], &["f32"]), (80, &[], &["f32", "bf16"])],
    };

    #[test]
    fn a_card_gets_the_newest_code_of_its_generation() {
        for (capability, cubin, ptx) in [
            ((6, 1), None, None),
            ((7, 0), None, None),
            ((7, 5), Some(75), Some(75)),
            ((8, 0), Some(80), Some(80)),
            ((8, 6), Some(86), Some(80)),
            ((8, 7), Some(86), Some(80)),
            ((8, 9), Some(89), Some(80)),
            ((9, 0), Some(90), Some(80)),
            ((10, 0), None, Some(80)),
            ((12, 0), Some(120), Some(80)),
            ((12, 1), Some(120), Some(80)),
        ] {
            let choice = UNIT.choose(capability);
            assert_eq!(choice.cubin.map(|c| c.0), cubin, "{capability:?}");
            assert_eq!(choice.ptx.map(|p| p.0), ptx, "{capability:?}");
        }
        assert_eq!(UNIT.choose((7, 5)).kernels, ["f32"]);
        assert_eq!(UNIT.choose((12, 0)).kernels, ["f32", "bf16"]);
    }

    #[test]
    fn embedded_code_is_what_it_claims_to_be() {
        for unit in UNITS {
            for (arch, cubin) in unit.cubins {
                assert!(inflated(cubin).starts_with(b"\x7fELF"), "{} sm_{arch}", unit.name);
            }
            for (base, ptx, kernels) in unit.ptx {
                let text = String::from_utf8(inflated(ptx)).unwrap();
                assert!(text.contains(&format!("\n.target sm_{base}\n")), "{}", unit.name);
                assert!(text.contains("\n.version 8.0\n"), "{}", unit.name);
                for kernel in *kernels {
                    assert!(text.contains(&format!(".visible .entry {kernel}(")), "{kernel}");
                }
            }
        }
    }

    #[test]
    fn no_kernel_has_two_homes() {
        for capability in [(7, 5), (8, 0)] {
            let mut seen = std::collections::BTreeMap::new();
            for unit in UNITS {
                for kernel in unit.choose(capability).kernels {
                    let first = seen.insert(kernel, unit.name);
                    assert_eq!(first, None, "{kernel} is also in {}", unit.name);
                }
            }
        }
    }
}
