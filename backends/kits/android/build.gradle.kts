// The model as an Android library: add `include(":model")` with this folder to settings.gradle.kts of the app.
plugins {
    id("com.android.library")
    id("org.jetbrains.kotlin.android")
}

// The files that an app needs go into its assets, below model/.
val modelAssets = layout.buildDirectory.dir("generated/assets")
val copyModel by tasks.registering(Copy::class) {
    from("..") { include("manifest.json", "@@android_model@@", "tokenizer.json") }
    into(modelAssets.map { it.dir("model") })
}

android {
    namespace = "qc.model"
    compileSdk = 35
    defaultConfig { minSdk = 24 }
@@gradle_native@@    sourceSets["main"].assets.srcDir(modelAssets)
    androidResources { noCompress += listOf("ort", "onnx", "data", "bin", "weights") }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

tasks.named("preBuild") { dependsOn(copyModel) }

dependencies {
@@gradle_dependency@@    implementation("ai.djl.huggingface:tokenizers:0.33.0")
    runtimeOnly("ai.djl.android:tokenizer-native:0.33.0")
}
