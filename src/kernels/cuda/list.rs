//! What a file of kernels says of itself, its CUDA source and the names of its kernels, and how the names follow
//! from dtypes.

use tch::Kind;

/// The kernels of one file.
pub struct Kernels {
    /// CUDA C++.
    pub source: &'static str,
    /// Kernels that exist once.
    pub untyped: &'static [&'static str],
    /// Kernels that exist for every dtype, under the name with its suffix.
    pub typed: &'static [&'static str],
    /// Kernels that exist for pairs of dtypes, the parameters' and the products', under the name with both.
    pub paired: &'static [&'static str],
}

/// The pairs.
const PAIRS: [(Kind, Kind); 5] = [
    (Kind::Float, Kind::Float),
    (Kind::Half, Kind::Half),
    (Kind::BFloat16, Kind::BFloat16),
    (Kind::Float, Kind::Half),
    (Kind::Float, Kind::BFloat16),
];

impl Kernels {
    /// A source that others need and that has no kernels.
    pub const fn of(source: &'static str) -> Self {
        Self { source, untyped: &[], typed: &[], paired: &[] }
    }

    /// The names of all.
    pub fn names(&self) -> impl Iterator<Item = String> + '_ {
        let untyped = self.untyped.iter().map(|&name| name.to_owned());
        let typed = self
            .typed
            .iter()
            .flat_map(|name| ["f32", "f16", "bf16"].map(|suffix| format!("{name}_{suffix}")));
        let paired = self.paired.iter().flat_map(|name| {
            let suffixes = PAIRS.iter().filter_map(|&(stored, wanted)| pair(stored, wanted));
            suffixes.map(move |suffix| format!("{name}_{suffix}"))
        });
        untyped.chain(typed).chain(paired)
    }
}

/// The suffix of the kernels for a dtype; `None` if they do not take it.
pub fn suffix(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Float => Some("f32"),
        Kind::Half => Some("f16"),
        Kind::BFloat16 => Some("bf16"),
        _ => None,
    }
}

/// The suffix of the kernels for a pair of dtypes, the parameters' and the products'; `None` if there are
/// none.
pub fn pair(stored: Kind, wanted: Kind) -> Option<String> {
    let known = PAIRS.contains(&(stored, wanted));
    known.then(|| Some(format!("{}_{}", suffix(stored)?, suffix(wanted)?))).flatten()
}
