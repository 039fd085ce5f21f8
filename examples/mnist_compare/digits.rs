//! Digits that the example draws itself, for machines without MNIST: strokes on 28×28 pixels, each
//! shifted, turned, scaled and slanted at random, with a pen of random thickness, and some noise.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::f32::consts::{PI, TAU};

use crate::data::{Split, PIXELS, SIDE};

type Point = (f32, f32);

/// The strokes of a digit, in a square from -1 to 1 with y pointing down.
fn strokes(digit: u8) -> Vec<Vec<Point>> {
    match digit {
        0 => vec![arc((0.0, 0.0), (0.6, 0.95), 0.0, TAU)],
        1 => vec![vec![(-0.3, -0.55), (0.1, -0.95), (0.1, 0.95)]],
        2 => {
            let mut bow = arc((0.0, -0.45), (0.55, 0.5), -PI, 0.35);
            bow.extend([(-0.6, 0.95), (0.65, 0.95)]);
            vec![bow]
        }
        3 => vec![
            arc((-0.05, -0.48), (0.5, 0.47), -0.8 * PI, 0.5 * PI),
            arc((-0.05, 0.47), (0.58, 0.48), -0.5 * PI, 0.8 * PI),
        ],
        4 => vec![vec![
            (0.25, 0.95),
            (0.25, -0.95),
            (-0.65, 0.35),
            (0.7, 0.35),
        ]],
        5 => {
            let mut bow = vec![(0.55, -0.95), (-0.4, -0.95), (-0.45, -0.1)];
            bow.extend(arc((-0.02, 0.38), (0.6, 0.56), -0.75 * PI, 0.8 * PI));
            vec![bow]
        }
        6 => vec![
            vec![(0.35, -0.95), (-0.25, -0.3), (-0.53, 0.35)],
            arc((0.0, 0.42), (0.55, 0.53), 0.0, TAU),
        ],
        7 => vec![vec![(-0.6, -0.95), (0.6, -0.95), (-0.15, 0.95)]],
        8 => vec![
            arc((0.0, -0.48), (0.46, 0.46), 0.0, TAU),
            arc((0.0, 0.48), (0.56, 0.48), 0.0, TAU),
        ],
        _ => vec![
            arc((0.0, -0.42), (0.55, 0.53), 0.0, TAU),
            vec![(0.55, -0.42), (0.45, 0.3), (0.1, 0.95)],
        ],
    }
}

/// Part of an ellipse as short lines, from angle `from` to `to` (0 is right, growing clockwise).
fn arc(centre: Point, radii: Point, from: f32, to: f32) -> Vec<Point> {
    const STEPS: usize = 16;
    let at = |i: usize| from + (to - from) * i as f32 / STEPS as f32;
    let point = |a: f32| (centre.0 + radii.0 * a.cos(), centre.1 + radii.1 * a.sin());
    (0..=STEPS).map(|i| point(at(i))).collect()
}

/// `count` digits, the classes in turn; the same for each seed.
pub fn draw(count: usize, seed: u64) -> Split {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut images = Vec::with_capacity(count * PIXELS);
    let labels: Vec<u8> = (0..count).map(|i| (i % 10) as u8).collect();
    for &label in &labels {
        images.extend(draw_one(label, &mut rng));
    }
    Split { images, labels }
}

fn draw_one(digit: u8, rng: &mut ChaCha8Rng) -> [u8; PIXELS] {
    let mut between = |low: f32, high: f32| low + (high - low) * rng.random::<f32>();
    let (angle, slant) = (between(-0.3, 0.3), between(-0.3, 0.3));
    let (width, height) = (between(5.5, 9.5), between(7.0, 10.5));
    let (dx, dy) = (between(-2.5, 2.5), between(-2.5, 2.5));
    let (pen, wobble) = (between(0.7, 1.7), 0.09);
    let (sin, cos) = angle.sin_cos();
    let centre = SIDE as f32 / 2.0;
    let mut lines = vec![];
    for stroke in strokes(digit) {
        let points: Vec<Point> = stroke
            .into_iter()
            .map(|(x, y)| {
                let x = (x + slant * -y + between(-wobble, wobble) * 0.5) * width;
                let y = (y + between(-wobble, wobble) * 0.5) * height;
                (
                    centre + dx + x * cos - y * sin,
                    centre + dy + x * sin + y * cos,
                )
            })
            .collect();
        lines.extend(points.windows(2).map(|pair| (pair[0], pair[1])));
    }
    let mut pixels = [0; PIXELS];
    for (i, pixel) in pixels.iter_mut().enumerate() {
        let at = ((i % SIDE) as f32 + 0.5, (i / SIDE) as f32 + 0.5);
        let distance = lines
            .iter()
            .map(|line| distance(at, *line))
            .fold(f32::MAX, f32::min);
        let ink = (pen + 0.5 - distance).clamp(0.0, 1.0);
        let noise = between(-0.12, 0.12);
        *pixel = ((ink + noise).clamp(0.0, 1.0) * 255.0) as u8;
    }
    pixels
}

/// From a point to the nearest point of a line.
fn distance(p: Point, (a, b): (Point, Point)) -> f32 {
    let (abx, aby) = (b.0 - a.0, b.1 - a.1);
    let length = (abx * abx + aby * aby).max(1e-9);
    let along = (((p.0 - a.0) * abx + (p.1 - a.1) * aby) / length).clamp(0.0, 1.0);
    (p.0 - a.0 - along * abx).hypot(p.1 - a.1 - along * aby)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_decides() {
        assert_eq!(draw(20, 7).images, draw(20, 7).images);
        assert_ne!(draw(20, 7).images, draw(20, 8).images);
    }

    #[test]
    fn digits_of_a_class_look_more_alike_than_others() {
        let Split { images, labels } = draw(2000, 1);
        let mut means = vec![[0f32; PIXELS]; 10];
        for (image, &label) in images.chunks(PIXELS).zip(&labels) {
            for (mean, &pixel) in means[label as usize].iter_mut().zip(image) {
                *mean += f32::from(pixel) / 200.0;
            }
        }
        let nearest = |image: &[u8]| {
            let distance = |mean: &[f32; PIXELS]| -> f32 {
                image
                    .iter()
                    .zip(mean)
                    .map(|(&p, m)| (f32::from(p) - m).powi(2))
                    .sum()
            };
            (0..10u8).min_by(|&a, &b| {
                distance(&means[a as usize]).total_cmp(&distance(&means[b as usize]))
            })
        };
        let right = images
            .chunks(PIXELS)
            .zip(&labels)
            .filter(|(image, &label)| nearest(image) == Some(label));
        // Chance would be a tenth; that it is far from all leaves something to learn.
        let share = right.count() as f32 / 2000.0;
        assert!(
            (0.5..0.98).contains(&share),
            "{share} are nearest to the mean of their class"
        );
    }
}
