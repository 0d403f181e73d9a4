//! Curves as SVG: axes, legend, gaps that are marked, light and dark.

use std::fmt::Write;

use super::escape::Escaped;
use super::number;
use super::scale::Scale;
use super::series::Point;
use super::trace::{Trace, smoothed, trace};

/// Colours of light and dark, as custom properties.
pub(super) const LIGHT: &str = include_str!("light.css");
/// The same names, on a dark ground.
pub(super) const DARK: &str = include_str!("dark.css");
/// How a chart looks, in terms of the colours.
pub(super) const STYLE: &str = include_str!("chart.css");

/// Colours of lines; more lines than these are shades between the first two.
const COLOURS: usize = 8;
/// The light colours once more, for programs that show SVG but know no custom properties.
const FALLBACK: [&str; COLOURS] = [
    "#2b62b5", "#c2410c", "#2e7d4f", "#7a4fb5", "#0f7a85", "#b0307a", "#7a6a00", "#5d6066",
];
/// From this many points on a smoothed line helps more than it hides.
const SMOOTH_FROM: usize = 8;

/// Width and height of a picture, in pixels at its natural size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Size {
    /// Across.
    pub width: f64,
    /// Down.
    pub height: f64,
}

impl Size {
    /// The main curve on a screen, and every curve that is a file of its own.
    pub const WIDE: Size = Size {
        width: 1040.0,
        height: 340.0,
    };
    /// The main curve on a tablet and on paper.
    pub const MEDIUM: Size = Size {
        width: 760.0,
        height: 310.0,
    };
    /// One of several beside each other, and everything on a phone.
    pub const SMALL: Size = Size {
        width: 360.0,
        height: 220.0,
    };
}

/// Lines over the steps of a run, in one frame.
#[derive(Debug, Clone, PartialEq)]
pub struct Chart {
    /// Letters, digits, `-`, `_` and `.`: the file's name and the prefix of ids.
    pub(super) name: String,
    pub(super) title: String,
    pub(super) lines: Vec<Line>,
    /// The axis is logarithmic where the values are positive and the highest is this many times the lowest, or more.
    pub(super) log_from: f64,
    /// The first and last step of the run: charts of a run share their axis.
    pub(super) steps: (u64, u64),
    /// Steps that deserve an upright line, and why.
    pub(super) marks: Vec<(u64, String)>,
}

/// One line of a chart.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Line {
    pub label: String,
    pub points: Vec<Point>,
    /// Few values with steps between them, as of evaluations: each is marked.
    pub sparse: bool,
    /// It scatters from step to step, so that a mean helps the eye.
    pub noisy: bool,
}

impl Chart {
    /// The name of its file, without `.svg`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The heading.
    pub fn title(&self) -> &str {
        &self.title
    }

    /// The chart as a file of its own: with title, ground and colours.
    pub fn document(&self, size: Size, smoothing: f64) -> String {
        let style = format!("{}{STYLE}", theme());
        self.draw(size, smoothing, Some(&style))
    }

    /// The chart as a part of a page that has the colours.
    pub(super) fn inline(&self, size: Size, smoothing: f64) -> String {
        self.draw(size, smoothing, None)
    }

    /// The whole picture in words, for those who do not see it.
    pub(super) fn description(&self) -> String {
        let mut text = String::new();
        for line in self.lines.iter().take(COLOURS) {
            let finite = || line.points.iter().filter(|point| point.value.is_finite());
            let (Some(first), Some(last)) = (finite().next(), finite().next_back()) else {
                let _ = write!(text, "{}: no finite value. ", line.label);
                continue;
            };
            let lowest = finite()
                .min_by(|a, b| a.value.total_cmp(&b.value))
                .unwrap_or(first);
            let highest = finite()
                .max_by(|a, b| a.value.total_cmp(&b.value))
                .unwrap_or(first);
            let _ = write!(
                text,
                "{}: {} at step {}, {} at step {}; lowest {} at step {}, highest {} at step {}. ",
                line.label,
                number::short(first.value),
                number::count(first.step),
                number::short(last.value),
                number::count(last.step),
                number::short(lowest.value),
                number::count(lowest.step),
                number::short(highest.value),
                number::count(highest.step),
            );
            let lost = line.points.len() - finite().count();
            if lost > 0 {
                let _ = write!(
                    text,
                    "{} of its values are not finite. ",
                    number::count(lost as u64)
                );
            }
        }
        if self.lines.len() > COLOURS {
            let _ = write!(text, "{} lines in all. ", self.lines.len());
        }
        text.trim_end().to_string()
    }

    fn draw(&self, size: Size, smoothing: f64, style: Option<&str>) -> String {
        let scale = self.scale((size.height / 45.0) as usize);
        let ticks = scale.map_or_else(Vec::new, |scale| scale.ticks());
        let widest = ticks.iter().map(|(_, text)| width_of(text)).fold(0.0, f64::max);
        let legend = Legend::new(self, size, smoothing, scale);
        let title = if style.is_some() { 32.0 } else { 0.0 };
        let frame = Frame {
            left: (widest + 12.0).max(28.0),
            right: size.width - 12.0,
            top: title + legend.height + 8.0,
            bottom: size.height - 24.0,
        };

        let Size { width, height } = size;
        let kind = if style.is_some() { "-file" } else { "" };
        let id = format!("{}-{width}{kind}", self.name);
        let mut svg = String::new();
        let _ = write!(
            svg,
            r#"<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-labelledby="{id}-title {id}-desc" font-family="system-ui, sans-serif" font-size="12"><title id="{id}-title">{}</title><desc id="{id}-desc">{}</desc>"#,
            Escaped(&self.title),
            Escaped(&self.description()),
        );
        if let Some(style) = style {
            let _ = write!(
                svg,
                r##"<style>{style}</style><rect class="ground" width="100%" height="100%" fill="#fff"/><text class="heading" x="12" y="24" font-size="15" font-weight="600">{}</text>"##,
                Escaped(&self.title)
            );
        }
        legend.draw(&mut svg, title);
        self.draw_axes(&mut svg, &frame, scale, &ticks);
        self.draw_lines(&mut svg, &frame, scale, smoothing);
        svg.push_str("</svg>");
        svg
    }

    /// The upright axis; none if no value is finite.
    fn scale(&self, ticks: usize) -> Option<Scale> {
        let values = self.lines.iter().flat_map(|line| &line.points).map(|p| p.value);
        let (low, high) = values
            .filter(|value| value.is_finite())
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
                (low.min(value), high.max(value))
            });
        (low <= high).then(|| Scale::around(low, high, self.log_from, ticks))
    }

    /// The level axis.
    fn steps(&self, frame: &Frame) -> Scale {
        Scale::of_steps(
            self.steps.0,
            self.steps.1,
            ((frame.right - frame.left) / 80.0) as usize,
        )
    }

    fn draw_axes(&self, svg: &mut String, frame: &Frame, scale: Option<Scale>, ticks: &[(f64, String)]) {
        let Frame {
            left,
            right,
            top,
            bottom,
        } = *frame;
        let mut grid = String::new();
        let mut texts = String::new();
        for (value, text) in ticks {
            let y = scale.map_or(bottom, |scale| frame.y(scale.place(*value)));
            let _ = write!(grid, "M{left:.1} {y:.1}H{right:.1}");
            let _ = write!(
                texts,
                r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{text}</text>"#,
                left - 6.0,
                y + 4.0
            );
        }
        let steps = self.steps(frame);
        let mut free_from = 0.0;
        for (value, text) in steps.whole_ticks() {
            let x = frame.x(steps.place(value));
            // Centred, but inside the picture; one that would touch its neighbour is left out.
            let half = width_of(&text) / 2.0;
            let centre = x.clamp(half, right + 10.0 - half);
            if centre - half < free_from {
                continue;
            }
            free_from = centre + half + 8.0;
            let _ = write!(grid, "M{x:.1} {bottom:.1}v4");
            let _ = write!(
                texts,
                r#"<text x="{centre:.1}" y="{:.1}" text-anchor="middle">{text}</text>"#,
                bottom + 18.0
            );
        }
        let _ = write!(
            svg,
            r##"<path class="grid" d="{grid}" fill="none" stroke="#dcdad4"/><path class="axis" d="M{left:.1} {bottom:.1}H{right:.1}" fill="none" stroke="#8a8c91"/><g class="ticks" fill="#5d6066">{texts}</g>"##
        );
        for (step, why) in &self.marks {
            if (self.steps.0..=self.steps.1).contains(step) {
                let x = frame.x(steps.place(*step as f64));
                let _ = write!(
                    svg,
                    r##"<path class="mark" d="M{x:.1} {top:.1}V{bottom:.1}" fill="none" stroke="#5d6066" stroke-dasharray="2 3"><title>{}</title></path>"##,
                    Escaped(why)
                );
            }
        }
    }

    fn draw_lines(&self, svg: &mut String, frame: &Frame, scale: Option<Scale>, smoothing: f64) {
        let steps = self.steps(frame);
        let x = |step: u64| frame.x(steps.place(step as f64));
        let y = |value: f64| scale.map_or(frame.bottom, |scale| frame.y(scale.place(value)));
        let mut above = String::new();
        for (i, line) in self.lines.iter().enumerate() {
            let whole = trace(&line.points, x);
            draw_gaps(svg, frame, line, &whole);
            let smooth = self.smooths(line, smoothing);
            let label = Escaped(&line.label);
            let class = match (smooth, line.sparse, self.lines.len() > COLOURS) {
                (true, _, _) => "line raw",
                (false, true, _) => "line sparse",
                (false, false, true) => "line many",
                (false, false, false) => "line",
            };
            let path = |class: &str, trace: &Trace| {
                format!(
                    r#"<path {} d="{}"><title>{label}</title></path>"#,
                    self.stroke(class, i),
                    data(trace, y)
                )
            };
            if smooth {
                svg.push_str(&path(class, &whole));
                let mean = trace(&smoothed(&line.points, smoothing), x);
                above.push_str(&path("line", &mean));
            } else {
                above.push_str(&path(class, &whole));
            }
            if line.sparse && line.points.len() <= 200 {
                for point in line.points.iter().filter(|point| point.value.is_finite()) {
                    let _ = write!(
                        above,
                        r#"<circle {} cx="{:.1}" cy="{:.1}" r="3.5"><title>{label}, step {}: {}</title></circle>"#,
                        self.stroke("dot", i),
                        x(point.step),
                        y(point.value),
                        number::count(point.step),
                        number::short(point.value)
                    );
                }
            }
        }
        svg.push_str(&above);
    }

    fn smooths(&self, line: &Line, smoothing: f64) -> bool {
        smoothing > 0.0 && line.noisy && line.points.len() >= SMOOTH_FROM && self.lines.len() <= COLOURS
    }

    /// Class and colour of a line, as attributes. No `style`: the page's policy allows none.
    fn stroke(&self, class: &str, i: usize) -> String {
        if self.lines.len() <= COLOURS {
            return format!(r#"class="{class} c{i}" fill="none" stroke="{}""#, FALLBACK[i]);
        }
        let share = 100 * i / (self.lines.len() - 1);
        format!(r#"class="{class}" fill="none" stroke="color-mix(in oklab, var(--c1) {share}%, var(--c0))""#)
    }
}

/// The colours of light and dark, for whoever is asked: the system, unless a page says `data-theme`. Paper is light.
pub(super) fn theme() -> String {
    format!(
        ":root{{{LIGHT}}}@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{DARK}}}}}@media \
         screen{{:root[data-theme=dark]{{{DARK}}}}}"
    )
}

/// Where the curves are, in pixels.
struct Frame {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

impl Frame {
    fn x(&self, place: f64) -> f64 {
        self.left + place * (self.right - self.left)
    }

    fn y(&self, place: f64) -> f64 {
        self.bottom - place * (self.bottom - self.top)
    }
}

/// The data of a path: pieces, a lone point as a stroke without length, which round ends make a dot.
fn data(trace: &Trace, y: impl Fn(f64) -> f64) -> String {
    let mut data = String::new();
    for piece in &trace.pieces {
        for (i, (x, value)) in piece.iter().enumerate() {
            let command = if i == 0 { 'M' } else { 'L' };
            let _ = write!(data, "{command}{x:.1} {:.1}", y(*value));
        }
        if piece.len() == 1 {
            data.push_str("h0");
        }
    }
    data
}

/// A band and a cross wherever values are not finite.
fn draw_gaps(svg: &mut String, frame: &Frame, line: &Line, trace: &Trace) {
    for gap in &trace.gaps {
        let width = (gap.to - gap.from).max(3.0);
        let left = (gap.from + gap.to - width) / 2.0;
        let (middle, top) = ((gap.from + gap.to) / 2.0, frame.top);
        let what = match (gap.first == gap.last, gap.count) {
            (true, _) => format!("step {}: not finite", number::count(gap.first)),
            (false, count) => format!(
                "steps {} to {}: {} values not finite",
                number::count(gap.first),
                number::count(gap.last),
                number::count(count as u64)
            ),
        };
        let _ = write!(
            svg,
            r##"<g class="gap" fill="#b3261e" stroke="#b3261e"><title>{}, {what}</title><rect x="{left:.1}" y="{top:.1}" width="{width:.1}" height="{:.1}" fill-opacity="0.2" stroke="none"/><path d="M{:.1} {:.1}l7 7m0 -7l-7 7" fill="none" stroke-width="1.5"/></g>"##,
            Escaped(&line.label),
            frame.bottom - top,
            middle - 3.5,
            top - 3.5,
        );
    }
}

/// What the lines are, above the frame.
struct Legend {
    /// Place, attributes of the swatch, text.
    entries: Vec<(f64, f64, String, String)>,
    height: f64,
}

impl Legend {
    const ROW: f64 = 18.0;

    fn new(chart: &Chart, size: Size, smoothing: f64, scale: Option<Scale>) -> Self {
        let mut said: Vec<(String, String)> = Vec::new();
        let swatch = |i: usize| chart.stroke("line", i);
        if chart.lines.len() <= COLOURS {
            for (i, line) in chart.lines.iter().enumerate() {
                if chart.smooths(line, smoothing) {
                    let alone = chart.lines.len() == 1;
                    let (raw, mean) = if alone {
                        ("as logged".into(), format!("smoothed {smoothing}"))
                    } else {
                        (
                            line.label.clone(),
                            format!("{}, smoothed {smoothing}", line.label),
                        )
                    };
                    said.push((chart.stroke("line raw", i), raw));
                    said.push((swatch(i), mean));
                } else {
                    said.push((swatch(i), line.label.clone()));
                }
            }
        } else {
            let last = chart.lines.len() - 1;
            said.push((swatch(0), chart.lines[0].label.clone()));
            said.push((swatch(last), chart.lines[last].label.clone()));
            said.push((
                String::new(),
                format!("{} lines, shades in their order", last + 1),
            ));
        }
        let lost = chart
            .lines
            .iter()
            .flat_map(|line| &line.points)
            .any(|p| !p.value.is_finite());
        if lost {
            let band = r##"class="band" fill="none" stroke="#b3261e""##;
            said.push((band.into(), "not finite".into()));
        }
        if scale.is_some_and(|scale| scale.is_logarithmic()) {
            said.push((String::new(), "log scale".into()));
        }
        if said.len() == 1 {
            // The heading says it.
            return Self {
                entries: Vec::new(),
                height: 0.0,
            };
        }
        let (mut x, mut y) = (12.0, 14.0);
        let mut entries = Vec::new();
        for (swatch, text) in said {
            let width = width_of(&text) + if swatch.is_empty() { 16.0 } else { 40.0 };
            if x > 12.0 && x + width > size.width {
                (x, y) = (12.0, y + Self::ROW);
            }
            entries.push((x, y, swatch, text));
            x += width;
        }
        Self {
            entries,
            height: y + 4.0,
        }
    }

    fn draw(&self, svg: &mut String, down: f64) {
        svg.push_str(r##"<g class="legend" fill="#1c1d20">"##);
        for (x, y, swatch, text) in &self.entries {
            let y = y + down;
            let mut at = *x;
            if !swatch.is_empty() {
                let _ = write!(svg, r#"<path {swatch} d="M{x:.1} {:.1}h18"/>"#, y - 4.0);
                at += 24.0;
            }
            let _ = write!(svg, r#"<text x="{at:.1}" y="{y:.1}">{}</text>"#, Escaped(text));
        }
        svg.push_str("</g>");
    }
}

/// About how wide a text is at 12 pixels: wide letters of East Asia take a square, the rest is rather over- than
/// underestimated.
fn width_of(text: &str) -> f64 {
    text.chars()
        .map(|c| if u32::from(c) >= 0x1100 { 12.0 } else { 6.9 })
        .sum()
}
