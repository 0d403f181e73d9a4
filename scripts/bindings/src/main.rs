//! `bindings HEADER OUTPUT`: the parameter structs and constants that HEADER itself declares, as Rust.

use bindgen::{AliasVariation, EnumVariation, Formatter};

const TOP: &str = "\
//! The parameter structs of the kernels, made from `cuda/kernels.h` by `scripts/bindings.sh`: edit that header.
//!
//! The assertions hold Rust to the layout that the C compiler uses.
#![allow(dead_code, clippy::all, rustdoc::all)]
";

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, header, output] = arguments.as_slice() else {
        eprintln!("usage: bindings HEADER OUTPUT");
        std::process::exit(2);
    };
    let bindings = bindgen::Builder::default()
        .header(header)
        .clang_args(["-xc++", "-std=c++17"])
        // Only this header: what it includes (stdint.h) becomes Rust's own integers.
        .allowlist_file(regex_escaped(header))
        .use_core()
        .ctypes_prefix("core::ffi")
        .default_enum_style(EnumVariation::Consts)
        .default_alias_style(AliasVariation::TypeAlias)
        .generate_comments(true)
        .layout_tests(true)
        .disable_header_comment()
        .formatter(Formatter::Rustfmt)
        .rustfmt_configuration_file(std::fs::canonicalize("rustfmt.toml").ok())
        .generate()
        .unwrap_or_else(|error| fail(&format!("{header}: {error}")));
    let text = format!("{TOP}\n{bindings}").trim_end().to_owned() + "\n";
    std::fs::write(output, text).unwrap_or_else(|error| fail(&format!("{output}: {error}")));
}

/// bindgen reads file names as regular expressions.
fn regex_escaped(path: &str) -> String {
    path.chars()
        .flat_map(|c| {
            (!c.is_alphanumeric() && c != '/' && c != '_')
                .then_some('\\')
                .into_iter()
                .chain([c])
        })
        .collect()
}

fn fail(message: &str) -> ! {
    eprintln!("error: {message}");
    std::process::exit(1);
}
