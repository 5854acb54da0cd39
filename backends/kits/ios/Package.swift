// swift-tools-version:5.9
import PackageDescription

let package = Package(
    name: "QcModel",
    platforms: [@@swift_platforms@@],
    products: [.library(name: "QcModel", targets: ["QcModel"])],
    dependencies: [
@@swift_dependencies@@        .package(url: "https://github.com/huggingface/swift-transformers", from: "1.0.0")
    ],
    targets: [
@@swift_targets@@        .target(
            name: "QcModel",
            dependencies: [
                @@swift_product@@,
                .product(name: "Tokenizers", package: "swift-transformers")
            ]
        )
    ]
)
