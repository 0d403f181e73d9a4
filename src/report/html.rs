//! `report.html`: one file that shows a run, for a browser without a network.
//!
//! The page is HTML and well-formed XML at once, so that tests can parse it. Whatever comes from a run goes through
//! [`Escaped`]; should that ever fail, the page's own security policy still runs no script and takes no style but ours, and loads
//! nothing.

use std::fmt::Write;

use sha2::{Digest as _, Sha256};

use super::answers;
use super::curves::{STYLE, Size, theme};
use super::escape::Escaped;
use super::figures::charts;
use super::folder::RunFiles;
use super::{overview, tables};

/// How the page looks.
const PAGE_STYLE: &str = include_str!("page.css");
/// The theme button. Without a script it is not shown and nothing is missing.
const SCRIPT: &str = include_str!("theme.js");

/// The whole page.
pub(super) fn page(run: &RunFiles, smoothing: f64) -> String {
    let name = Escaped(&run.name);
    let style = format!("{}{STYLE}{PAGE_STYLE}", theme());
    let mut page = String::new();
    let _ = write!(
        page,
        r#"<!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml" lang="en">
<head>
<meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; img-src data:; base-uri 'none'; form-action 'none'"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="referrer" content="no-referrer"/>
<meta name="generator" content="glmtune {}"/>
<link rel="icon" href="data:,"/>
<title>{name} – glmtune report</title>
<style>{style}</style>
</head>
<body>
"#,
        base64(&Sha256::digest(&style)),
        base64(&Sha256::digest(SCRIPT)),
        env!("CARGO_PKG_VERSION"),
    );
    overview::header(&mut page, run);
    page.push_str("<main>\n");
    overview::key_figures(&mut page, run);
    overview::notices(&mut page, &run.record);
    curves(&mut page, run, smoothing);
    tables::evaluation(&mut page, run);
    answers::section(&mut page, run);
    tables::metrics(&mut page, run);
    overview::resources(&mut page, &run.record);
    overview::hashes(&mut page, &run.record);
    overview::configuration(&mut page, &run.config);
    let _ = write!(
        page,
        "</main>\n<footer><p>Made by glmtune {} from <code>run.json</code>, <code>metrics.jsonl</code>, \
         <code>samples.jsonl</code> and <code>run.toml</code> of the run. One file, no network.</p></footer>\n\
         <script>{SCRIPT}</script>\n</body>\n</html>\n",
        env!("CARGO_PKG_VERSION")
    );
    page
}

/// The loss across the page, drawn for three widths so that its letters are never small; the others beside each other.
fn curves(page: &mut String, run: &RunFiles, smoothing: f64) {
    let charts = charts(&run.series, &run.record);
    if charts.is_empty() {
        page.push_str("<section><h2>Curves</h2><p class=\"quiet\">No step was logged.</p></section>\n");
        return;
    }
    page.push_str("<section><h2>Curves</h2>\n<div class=\"charts\">\n");
    for (i, chart) in charts.iter().enumerate() {
        let (class, drawings) = if i == 0 {
            let sizes = [
                ("wide", Size::WIDE),
                ("medium", Size::MEDIUM),
                ("narrow", Size::SMALL),
            ];
            let drawings = sizes.map(|(screen, size)| {
                format!(
                    r#"<div class="on-{screen}">{}</div>"#,
                    chart.inline(size, smoothing)
                )
            });
            ("chart-wide", drawings.concat())
        } else {
            ("chart-small", chart.inline(Size::SMALL, smoothing))
        };
        let _ = writeln!(
            page,
            r#"<figure class="{class}"><figcaption><h3>{}</h3></figcaption>{drawings}</figure>"#,
            Escaped(chart.title()),
        );
    }
    page.push_str("</div>\n<p class=\"quiet\">Horizontal axes are optimizer steps.");
    if !run.record.resumed_at.is_empty() {
        page.push_str(" Dotted upright lines: the run was interrupted there and resumed.");
    }
    page.push_str("</p></section>\n");
}

/// Base64 with padding (RFC 4648), as a security policy spells hashes.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let group = (0..3).fold(0usize, |group, i| {
            group << 8 | usize::from(chunk.get(i).copied().unwrap_or(0))
        });
        for i in 0..4 {
            let letter = char::from(LETTERS[group >> (18 - 6 * i) & 63]);
            text.push(if i <= chunk.len() { letter } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::curves::{DARK, LIGHT};
    use super::*;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn both_themes_name_the_same_colours() {
        let names = |css: &str| -> Vec<String> {
            let pairs = css.split(';').filter_map(|pair| pair.split_once(':'));
            pairs.map(|(name, _)| name.to_string()).collect()
        };
        assert_eq!(names(LIGHT), names(DARK));
        assert!(
            !SCRIPT.contains(['<', '&']),
            "the script must be XML text as it is"
        );
    }
}
