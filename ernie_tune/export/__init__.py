"""From a trained model to a folder that serves: merge, quantise, FastDeploy and Hugging Face layouts, verification."""
